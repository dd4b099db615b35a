"""Copies of a model: frozen, trained, averaged, brought back. What is done to parameters is done to rows."""

import copy
import io

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from byrote import EngramConfig, EngramForCausalLM
from byrote.tables.placements.copied import CopiedTable
from byrote.train.optimizer import Optimizer

ROWS = torch.arange(60)


def build(seed: int = 0, **changes) -> EngramForCausalLM:
    torch.manual_seed(seed)
    fields = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, memory_layers=[0, 1], memory_table_sizes=[31, 37])
    config = EngramConfig.from_preset("nano", **fields, memory_seed=seed, memory_initializer_range=0.5, **changes)
    return EngramForCausalLM(config).eval()


def batch(seed: int) -> torch.Tensor:
    return torch.randint(3, 40, (2, 12), generator=torch.Generator().manual_seed(seed))


def train(model: EngramForCausalLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model.train()
    model(input_ids=batch(seed), labels=batch(seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=batch(9), use_cache=False).logits


def rows_of(model: EngramForCausalLM) -> torch.Tensor:
    return torch.stack([memory.table.read(ROWS) for _, memory in model.memory_stack.items()])


def test_a_frozen_copy_stands_still_while_the_model_is_trained():
    model = build()
    reference = copy.deepcopy(model).requires_grad_(False)
    before, rows = logits(reference), rows_of(reference)
    optimizer = Optimizer(model, lr=1e-2)
    for seed in range(3):
        train(model, optimizer, seed)
    assert torch.equal(logits(reference), before) and torch.equal(rows_of(reference), rows)
    assert not torch.equal(rows_of(model), rows)


def test_each_copy_has_its_own_pending_gradients():
    model = build()
    other = copy.deepcopy(model)
    model.train()
    model(input_ids=batch(0), labels=batch(0)).loss.backward()
    third = copy.deepcopy(model)
    other.zero_grad()
    third.zero_grad()
    optimizer = Optimizer(model, lr=1e-2)
    optimizer.step()
    assert optimizer.rows_touched > 0


def test_two_copies_train_apart_and_alike():
    one = build()
    first = Optimizer(one, lr=1e-2)
    train(one, first, 0)
    two = copy.deepcopy(one)
    second = Optimizer(two, lr=1e-2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in (1, 2):
        train(one, first, seed)
        train(two, second, seed)
    assert torch.equal(logits(one), logits(two)) and torch.equal(rows_of(one), rows_of(two))
    train(two, second, 3)
    assert not torch.equal(rows_of(one), rows_of(two))
    assert isinstance(two.memory_stack.items()[0][1].table, CopiedTable)


AVERAGES = {
    "mean": {},
    "mean, over lists": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "moving": {"avg_fn": get_ema_avg_fn(0.7)},
    "moving, over lists": {"multi_avg_fn": get_ema_multi_avg_fn(0.7)},
}


@pytest.mark.parametrize("how", AVERAGES)
def test_an_average_is_one_of_rows_too(how, tmp_path):
    model = build()
    average, optimizer, expected = AveragedModel(model, **AVERAGES[how]), Optimizer(model, lr=1e-2), None
    for step in range(4):
        train(model, optimizer, step)
        average.update_parameters(model)
        weight = 0.3 if "moving" in how else 1 / (step + 1)
        expected = rows_of(model) if expected is None else torch.lerp(expected, rows_of(model), weight)
        if step == 1:  # read on the way, or not
            with torch.inference_mode():
                average(input_ids=batch(9), use_cache=False)
    torch.testing.assert_close(rows_of(average.module), expected, atol=1e-6, rtol=0)
    assert not torch.equal(rows_of(average.module), rows_of(model))
    average.module.save_pretrained(tmp_path)
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path)), logits(average))


def mul_then_add(mine, theirs):
    mine.data.mul_(0.4).add_(theirs.data, alpha=0.6)


def in_two_statements(mine, theirs):
    mine.data.mul_(0.4)
    mine.data.add_(0.6 * theirs.data)


def sum_then_factor(mine, theirs):
    mine.data.add_(1.5 * theirs.data)
    mine.data.div_(2.5)


def put_in_place(mine, theirs):
    mine.data = 0.4 * mine.data + theirs.data * 0.6


def difference(mine, theirs):
    with torch.no_grad():
        mine -= 0.6 * (mine - theirs)


SYNCS = [mul_then_add, in_two_statements, sum_then_factor, put_in_place, difference]


@pytest.mark.parametrize("sync", SYNCS, ids=lambda sync: sync.__name__)
@pytest.mark.parametrize("related", [True, False])
def test_a_reference_that_is_pulled_after_the_model(sync, related, tmp_path):
    """TR-DPO, as people write it; the reference is a copy, or was loaded by itself."""
    model = build()
    model.save_pretrained(tmp_path)
    reference = copy.deepcopy(model) if related else EngramForCausalLM.from_pretrained(tmp_path)
    optimizer = Optimizer(model, lr=1e-2)
    for seed in range(2):
        train(model, optimizer, seed)
        expected = 0.4 * rows_of(reference) + 0.6 * rows_of(model)
        for mine, theirs in zip(reference.parameters(), model.parameters(), strict=True):
            sync(mine, theirs)
        train(model, optimizer, seed + 5)  # the rows of the moment count
        torch.testing.assert_close(rows_of(reference), expected, atol=1e-6, rtol=0)
        logits(reference)


@pytest.mark.parametrize("cloned", [True, False])
def test_weights_of_a_copy_are_loaded_with_their_rows(cloned):
    model = build()
    best = copy.deepcopy(model)
    train(model, Optimizer(model, lr=1e-2), 0)
    state = best.state_dict()
    model.load_state_dict({name: value.clone() for name, value in state.items()} if cloned else state)
    assert torch.equal(rows_of(model), rows_of(best)) and torch.equal(logits(model), logits(best))


def test_weights_that_are_exchanged():
    """As a callback evaluates an average in place of the model."""
    model = build()
    average = copy.deepcopy(model)
    optimizer = Optimizer(model, lr=1e-2)
    train(model, optimizer, 0)
    before = rows_of(model), rows_of(average)
    for _ in range(2):
        for current, other in zip(model.parameters(), average.parameters(), strict=True):
            kept = other.data.clone()
            other.data.copy_(current.data)
            current.data.copy_(kept)
        assert torch.equal(rows_of(average), before[0]) and torch.equal(rows_of(model), before[1])
        logits(average)
        model, average = average, model
    train(model, Optimizer(model, lr=1e-2), 1)


def test_what_rows_cannot_follow_is_refused():
    model, stranger = build(), build(seed=1)
    shadow = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, Optimizer(model, lr=1e-2), 0)
    for mine, theirs in zip(model.parameters(), shadow, strict=True):
        mine.data.copy_(theirs)  # rows of a moment that is gone
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        logits(model)
    other = copy.deepcopy(stranger)
    for mine, theirs in zip(other.parameters(), stranger.parameters(), strict=True):
        mine.data.mul_(0.5).add_(theirs.data)  # no average
    with pytest.raises(ValueError, match="weights that sum to 1"):
        logits(other)


def test_a_table_that_is_only_read_cannot_be_averaged(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    filed = EngramForCausalLM.from_pretrained(tmp_path, placement="file")
    train(model, Optimizer(model, lr=1e-2), 0)
    for mine, theirs in zip(filed.parameters(), model.parameters(), strict=True):
        mine.data.lerp_(theirs.data, 0.5)
    with pytest.raises(ValueError, match="open for reading only"):
        logits(filed)


def test_decay_and_files_leave_rows_alone():
    """An optimizer decays the anchors of a copy as of any model; a state dict from a file is plain tensors."""
    model = copy.deepcopy(build())
    rows, optimizer = rows_of(model), torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _, memory in model.memory_stack.items():
        memory.anchor.grad = torch.zeros(1)
    optimizer.step()
    model.zero_grad()
    logits(model)
    assert torch.equal(rows_of(model), rows)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert {type(value) for value in loaded.values()} == {torch.Tensor}
    model.load_state_dict(loaded)
    assert torch.equal(rows_of(model), rows)
    state = copy.deepcopy(model.state_dict())
    train(model, Optimizer(model, lr=1e-2), 0)
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="generation"):
        logits(model)
