"""However a step is cut up, it is the same step."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR

from byrote import EngramConfig, EngramForCausalLM
from byrote.nn.router import Router
from byrote.train.muon import Muon
from byrote.train.optimizer import Optimizer

KINDS = pytest.mark.parametrize("muon", [None, Muon()], ids=["adamw", "muon"])


def make(seed=0, **overrides) -> EngramForCausalLM:
    torch.manual_seed(seed)
    return EngramForCausalLM(EngramConfig.from_preset("nano", vocab_size=64, memory_layers=[1, 2], **overrides))


def batch(rows=8, seed=1):
    ids = torch.randint(3, 64, (rows, 16), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row in range(rows):
        labels[row, : row + 1] = -100  # a different number of predicted tokens in every row
    return ids, labels


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for layer, memory in model.model.memories.items():
        state[f"rows.{layer}"] = memory.table.rows.clone()
    return state


def assert_same_state(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if tolerance and name.endswith("identity"):  # another one, where rows are equal but for rounding
            continue
        torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def train(model, batches, *, steps=1, lr=1e-3, forward=None, **options):
    """`steps` optimizer steps; every step accumulates over `batches`."""
    optimizer = Optimizer(model, lr=lr, **options)
    items = sum((labels[:, 1:] != -100).sum() for _, labels in batches)
    model.train()
    for _ in range(steps):
        for ids, labels in batches:
            loss = (forward or model)(input_ids=ids, labels=labels, num_items_in_batch=items).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return snapshot(model)


def micro_batches(ids, labels, rows):
    return list(zip(ids.split(rows), labels.split(rows), strict=True))


@KINDS
@pytest.mark.parametrize("alpha", [1e-4, 1.0])
def test_accumulation(alpha, muon):
    """8 x 1 = 1 x 8. Adam at epsilon 1e-8 would make a step of gradients that are nothing but rounding.

    Muon does so of singular values, and those of an expert with few tokens are: hybrid enlarges what is nearly zero
    80,000 times. Hence 5e-6, a 300th of its step.
    """
    ids, labels = batch()
    whole = train(make(balance_loss_alpha=alpha), [(ids, labels)], eps=1e-5, muon=muon)
    parts = train(make(balance_loss_alpha=alpha), micro_batches(ids, labels, 1), eps=1e-5, muon=muon)
    assert_same_state(whole, parts, 5e-6 if muon else 1e-6)


def test_accumulation_over_four_streams_with_modules():
    ids, labels = batch()
    settings = {"num_streams": 4, "num_nextn_predict_layers": 2}
    whole = train(make(**settings), [(ids, labels)], eps=1e-5)
    parts = train(make(**settings), micro_batches(ids, labels, 1), eps=1e-5)
    assert_same_state(whole, parts, 1e-6)


CHECKPOINTED = (
    {"num_nextn_predict_layers": 1},
    {"num_streams": 4, "num_nextn_predict_layers": 2},
    {"num_streams": 4, "stream_connection": "hc"},
)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_nextn_predict_layers": 1},
        {"num_streams": 4},
        {"num_streams": 4, "stream_connection": "hc"},
        {"num_streams": 4, "num_nextn_predict_layers": 2},
    ],
)
def test_gradient_checkpointing(use_reentrant, settings):
    ids, labels = batch()
    plain = train(make(**settings), [(ids, labels)], steps=2)
    model = make(**settings)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    loads = []
    for module in model.modules():
        if isinstance(module, Router):
            record = module.record
            module.record = lambda counts, record=record: (loads.append(counts), record(counts))[-1]
    assert_same_state(train(model, [(ids, labels)], steps=2), plain, 0)
    routers = 3 + settings.get("num_nextn_predict_layers", 0)
    assert len(loads) == 2 * routers  # two steps: the recomputation is not counted


def test_two_forwards_before_one_backward():
    (ids, labels), (other, other_labels) = batch(4), batch(4, seed=2)
    items = (labels[:, 1:] != -100).sum() + (other_labels[:, 1:] != -100).sum()

    def gradients(model, together):
        losses = [
            model(input_ids=i, labels=t, num_items_in_batch=items).loss
            for i, t in ((ids, labels), (other, other_labels))
            if together or (i is ids)
        ]
        sum(losses).backward()
        if not together:
            model(input_ids=other, labels=other_labels, num_items_in_batch=items).loss.backward()
        rows = [memory.lookup.pending.take() for _, memory in model.model.memories.items()]
        return [p.grad for p in model.parameters()], rows

    for (ours, our_rows), (theirs, their_rows) in [(gradients(make(), True), gradients(make(), False))]:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        for (a, sums), (b, other_sums) in zip(our_rows, their_rows, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(sums, other_sums, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("num_streams", [1, 4])
def test_bf16_autocast_learns(num_streams):
    ids, labels = batch()
    model = make(num_streams=num_streams)

    def forward(**inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs)

    with torch.no_grad():
        before = model(input_ids=ids, labels=labels).loss
    train(model, [(ids, labels)], steps=30, lr=3e-3, forward=forward)
    with torch.no_grad():
        assert model(input_ids=ids, labels=labels).loss < 0.7 * before
    assert all(memory.table.rows.dtype == torch.float32 for _, memory in model.model.memories.items())


@pytest.mark.parametrize("num_streams", [1, 4])
def test_two_runs_with_one_seed_are_equal(num_streams):
    runs = [train(make(num_streams=num_streams), [batch()], steps=3) for _ in range(2)]
    assert_same_state(*runs, 0)


@KINDS
@pytest.mark.parametrize(("dtype", "num_streams"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 4)])
def test_resume_is_uninterrupted(tmp_path, dtype, num_streams, muon):
    ids, labels = batch()

    def steps(model, optimizer, count):
        model.train()
        for _ in range(count):
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model = make(num_streams=num_streams, num_nextn_predict_layers=1).to(dtype)
    optimizer = Optimizer(model, muon=muon)
    steps(model, optimizer, 3)
    model.save_pretrained(tmp_path)
    model.save_row_state(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    steps(model, optimizer, 3)

    resumed = EngramForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in resumed.parameters()} == {dtype}
    resumed.load_row_state(tmp_path)
    optimizer = Optimizer(resumed, muon=muon)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    steps(resumed, optimizer, 3)
    assert_same_state(snapshot(resumed), snapshot(model), 0)


def test_optimizer_state_of_another_moment_is_refused(tmp_path):
    ids, labels = batch()
    model = make()
    optimizer = Optimizer(model)
    before = copy.deepcopy(optimizer.state_dict())
    model(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="table generation 0, the model has 1"):
        optimizer.load_state_dict(before)
    other = Optimizer(make(memory_table_sizes=[503, 997]))
    with pytest.raises(ValueError, match="table digest"):
        other.load_state_dict(before)


@KINDS
def test_the_schedule_reaches_every_kind_after_prepare(muon):
    accelerator = Accelerator(cpu=True)
    model = make()
    optimizer = Optimizer(model, lr=1e-3, row_rate=5.0, muon=muon, muon_rate=2.0)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    ids, labels = batch()
    moved = []
    for _ in range(3):
        before = snapshot(model)
        accelerator.backward(model(input_ids=ids, labels=labels).loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        after = snapshot(model)
        moved.append({name: (after[name].float() - before[name].float()).abs().max() for name in after})
    rates = {group["kind"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"adamw": 1e-3 / 8, "rows": 5e-3 / 8} | ({"muon": 2e-3 / 8} if muon else {})
    # First steps are about as long as the rate: the schedule is seen in what moved, not only in the groups.
    matrices = ("model.layers.0.attention.q_proj.weight", "model.layers.1.experts.experts.gate_up")
    for name in ("rows.1", "rows.2", "model.embed_tokens.weight", *matrices):
        assert moved[2][name] < 0.5 * moved[0][name]


def test_a_grad_scaler_is_refused():
    model = make()
    optimizer = Optimizer(model)
    scaler = torch.amp.GradScaler("cpu")
    ids, labels = batch()
    scaler.scale(model(input_ids=ids, labels=labels).loss).backward()
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        scaler.step(optimizer)


@pytest.mark.parametrize("through", ["model", "optimizer", "wrapper"])
def test_zero_grad_drops_row_gradients(through):
    ids, labels = batch()
    model = make()
    optimizer = Optimizer(model)
    before = [memory.table.rows.clone() for _, memory in model.model.memories.items()]
    model(input_ids=ids, labels=labels).loss.backward()
    wrapper = torch.nn.ModuleList([model])
    {"model": model, "optimizer": optimizer, "wrapper": wrapper}[through].zero_grad()
    optimizer.step()
    for (_, memory), rows in zip(model.model.memories.items(), before, strict=True):
        assert torch.equal(memory.table.rows, rows)


def test_a_frozen_anchor_freezes_the_table():
    ids, labels = batch()
    model = make()
    memories = dict(model.model.memories.items())
    memories[1].anchor.requires_grad_(False)
    before = memories[1].table.rows.clone(), memories[2].table.rows.clone()
    optimizer = Optimizer(model)
    model(input_ids=ids, labels=labels).loss.backward()
    assert not memories[1].lookup.pending.parts
    optimizer.step()
    assert torch.equal(memories[1].table.rows, before[0]) and memories[1].table.generation == 0
    assert not torch.equal(memories[2].table.rows, before[1])


def test_non_finite_row_gradients_change_nothing():
    ids, labels = batch()
    model = make()
    optimizer = Optimizer(model)
    before = snapshot(model)
    (model(input_ids=ids, labels=labels).loss * float("inf")).backward()
    for parameter in model.parameters():
        parameter.grad = None if parameter.shape != (1,) else parameter.grad
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    after = snapshot(model)
    assert all(torch.equal(after[name], before[name]) for name in after if "rows" in name)
