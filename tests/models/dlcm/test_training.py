"""What moves boundaries and what does not; checkpointing, half precision, micro-batches."""

import pytest
import torch
from torch import nn

from byrote import DLCMForCausalLM
from byrote.nn.boundary import parser_loss
from tests.models.dlcm.conftest import FORMS, VOCABULARY, make, trained

ALL = pytest.mark.parametrize("form", FORMS)


def batch(rows=4, steps=16, seed=1):
    return torch.randint(3, VOCABULARY, (rows, steps), generator=torch.Generator().manual_seed(seed))


def drawn(rows=4, steps=16):
    return torch.rand(rows, steps, generator=torch.Generator().manual_seed(2)) < 0.3


def boundary_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.model.concepts.boundary.parameters()]


@ALL
@pytest.mark.parametrize("mode", ["decoupled", "e2e"])
def test_which_loss_moves_boundaries(form, mode):
    """decoupled: not the language loss, by no path; e2e: it does, by smoothing and by the straight-through factor."""
    model, ids = make(**FORMS[form], boundary_mode=mode).train(), batch()
    p = []
    model.model.concepts.boundary.register_forward_hook(lambda m, a, out: (out[0].retain_grad(), p.append(out[0]))[-1])
    loss = nn.functional.cross_entropy(model(input_ids=ids, boundaries=drawn()).logits.flatten(0, 1), ids.flatten())
    gradients = boundary_gradients(model, loss)
    if mode == "decoupled":
        assert all(g is None or not g.any() for g in gradients) and (p[-1].grad is None or not p[-1].grad.any())
    else:
        assert all(g.any() for g in gradients) and p[-1].grad.any()
    out = model(input_ids=ids)
    gradients = boundary_gradients(
        model, parser_loss(out.boundary_probabilities, out.boundaries, out.alive, model.config.compression_ratio)
    )
    assert all(g.any() for g in gradients)
    assert model.model.encoder[0].attention.q_proj.weight.grad.any()  # it goes on into the encoder


def test_e2e_without_smoothing_still_moves_them():
    """By the straight-through factor alone, whose value is 1."""
    model, ids = make(boundary_mode="e2e", concept_smoothing="none").train(), batch()
    out = model(input_ids=ids, boundaries=drawn())
    assert all(g.any() for g in boundary_gradients(model, out.logits.square().sum()))
    twin = make(boundary_mode="decoupled", concept_smoothing="none").train()
    torch.testing.assert_close(twin(input_ids=ids, boundaries=drawn()).logits, out.logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_loss_is_the_sum_of_its_parts(weight):
    model, ids = make(boundary_weight=weight).train(), batch()
    out = model(input_ids=ids, labels=ids, boundaries=drawn())
    language = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    parser = parser_loss(out.boundary_probabilities, out.boundaries, out.alive, 4.0)
    torch.testing.assert_close(out.loss, language + weight * parser)
    torch.testing.assert_close(out.parser_loss, parser.detach())
    assert not out.parser_loss.requires_grad
    short = model(input_ids=ids, labels=ids, boundaries=drawn(), skip_logits=True)
    assert short.logits is None
    torch.testing.assert_close(short.loss, out.loss)
    out = model.eval()(input_ids=ids, labels=ids)
    language = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, language)
    assert out.parser_loss is None


def test_a_rule_has_no_loss_and_draws_nothing():
    model, ids = make(boundary_mode="rule", boundary_threshold=0.3).train(), batch()
    assert not list(model.model.concepts.boundary.parameters())
    first, second = (model(input_ids=ids, labels=ids) for _ in range(2))
    assert torch.equal(first.boundaries, second.boundaries) and first.parser_loss is None
    assert torch.equal(first.boundaries[:, 1:], first.boundary_probabilities[:, 1:] >= 0.3)


def test_boundaries_are_drawn_in_training_alone():
    model, ids = make(), batch(16)
    torch.manual_seed(0)
    first, second = (model.train()(input_ids=ids).boundaries for _ in range(2))
    assert not torch.equal(first, second) and first[:, 0].all()
    first, second = (model.eval()(input_ids=ids) for _ in range(2))
    assert torch.equal(first.boundaries, second.boundaries)
    assert torch.equal(first.boundaries[:, 1:], first.boundary_probabilities[:, 1:] >= 0.5)
    sharp = make(boundary_temperature=1e6).train()  # so sharp that drawing is choosing
    assert torch.equal(sharp(input_ids=ids).boundaries, sharp.eval()(input_ids=ids).boundaries)


@ALL
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(form, use_reentrant):
    ids, results = batch(), []
    for checkpointed in (False, True):
        model = make(**FORMS[form], boundary_mode="e2e").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        runs = []
        model.model.concepts.layers[0].attention.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        model(input_ids=ids, labels=ids, boundaries=drawn()).loss.backward()
        assert len(runs) == 1 + checkpointed
        rows = [memory.lookup.pending.take() for _, memory in model.memory_stack.items()] if model.memory_stack else []
        results.append(({name: p.grad for name, p in model.named_parameters()}, rows))
    (plain, rows), (checkpointed, rows_again) = results
    for name, gradient in plain.items():
        assert gradient is not None and torch.equal(checkpointed[name], gradient), name
    torch.testing.assert_close(rows_again, rows, atol=0, rtol=0)


@ALL
def test_micro_batches_add_up(form):
    """Boundaries chosen first, counts of the whole step: the gradient of one batch, however its rows are split."""
    ids, results = batch(), []
    labels = ids.clone()
    for row in range(4):
        labels[row, : row + 1] = -100
    items = (labels[:, 1:] != -100).sum()
    for rows in (4, 1):
        model = make(**FORMS[form], boundary_weight=1.0).train()
        torch.manual_seed(5)
        chosen, counts = model.choose_boundaries(ids)
        assert counts.tolist() == [int(chosen.sum()), ids.numel()]
        loss = 0.0
        for part, targets, own in zip(ids.split(rows), labels.split(rows), chosen.split(rows), strict=True):
            out = model(
                input_ids=part, labels=targets, boundaries=own, boundary_counts=counts, num_items_in_batch=items
            )
            assert torch.equal(out.boundaries, own)
            out.loss.backward()
            loss += float(out.loss.detach())
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(
            results[1][1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_micro_batches_that_know_only_their_own_rate():
    """As the stock Trainer gives them: of equal ones each counts its share, and not once more each."""
    ids, boundaries, results = batch(1).expand(4, -1), drawn(1).expand(4, -1), []
    for rows in (4, 1):
        model, loss = make(boundary_weight=1.0).train(), 0.0
        for part, own in zip(ids.split(rows), boundaries.split(rows), strict=True):
            out = model(input_ids=part, labels=part, boundaries=own, num_items_in_batch=torch.tensor(4 * 15))
            out.loss.backward()
            loss += float(out.loss.detach())
        results.append((loss, [p.grad for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-5, rtol=1e-4)


def test_choosing_boundaries_is_the_choice_of_a_forward(model, ids):
    chosen, counts = model.choose_boundaries(ids)
    assert torch.equal(chosen, model(input_ids=ids).boundaries) and counts[1] == ids.numel()
    model.train()
    torch.manual_seed(0)
    chosen, _ = model.choose_boundaries(ids)
    torch.manual_seed(0)
    assert torch.equal(chosen, model(input_ids=ids, use_cache=False).boundaries)


def test_balance_losses_belong_to_their_rows():
    """With a cache, of the rows that form concepts; the others have none."""
    model, ids = make(**FORMS["deepseek"]).train(), batch(3)
    boundaries = torch.zeros(3, 16, dtype=torch.bool)
    boundaries[1, 10:14] = True
    cache = model(input_ids=ids[:, :8], boundaries=boundaries[:, :8], use_cache=True).past_key_values
    out = model.model(input_ids=ids[:, 8:], boundaries=boundaries[:, 8:], past_key_values=cache)
    assert out.balance_loss.shape == (3,) and out.balance_loss[1] > 0
    assert out.balance_loss[0] == out.balance_loss[2] == 0


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(form, dtype, ids, tmp_path):
    """The boundary head stays in float32, with what connects streams; probabilities are float32."""
    model = trained(**FORMS[form])
    held = drawn(2, 12)
    with torch.no_grad():
        expected = model(input_ids=ids, boundaries=held).logits
    model.save_pretrained(tmp_path)
    loaded = DLCMForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    kept = {name.rpartition(".")[0] for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert {"model.concepts.boundary.query", "model.concepts.boundary.key"} <= kept
    wide = ("boundary", "connection", "exit")
    assert all(any(word in name for word in wide) for name in kept) and len(kept) >= (8 if form == "deepseek" else 2)
    out = loaded(input_ids=ids, boundaries=held)
    assert out.boundary_probabilities.dtype == torch.float32 and out.logits.dtype == dtype
    torch.testing.assert_close(out.logits.float(), expected, atol=0.02, rtol=0)
    again = loaded.generate(ids, max_new_tokens=6, do_sample=False, min_new_tokens=6)
    assert again.shape == (2, 18)
    everywhere = trained(**FORMS[form]).to(dtype)  # and where all of the weights were cast
    assert everywhere(input_ids=ids).boundary_probabilities.dtype == torch.float32


@ALL
def test_autocast(form, ids):
    """Streams of tokens and of concepts are float32, as is what decides boundaries; it learns."""
    model, seen = make(**FORMS[form]).train(), set()
    for layer in [*model.model.encoder, *model.model.concepts.layers, *model.model.decoder]:
        layer.register_forward_hook(lambda module, args, out: seen.update({args[0].dtype, out[0].dtype}))
    batch_ids, optimizer = batch(), torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=batch_ids, labels=batch_ids, boundaries=drawn())
        assert out.boundary_probabilities.dtype == torch.float32
        out.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        if model.memory_stack is not None:
            model.memory_stack.drop_pending()
        losses.append(float(out.loss.detach()))
    assert seen == {torch.float32} and losses[-1] < losses[0] - 0.2
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        whole = model.eval()(input_ids=ids, boundaries=drawn(2, 12), use_cache=False).logits
        cache, parts = None, []
        for at in range(0, 12, 4):
            out = model(input_ids=ids[:, at : at + 4], boundaries=drawn(2, 12)[:, at : at + 4], past_key_values=cache)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1).float(), whole.float(), atol=0.05, rtol=0.05)


def test_training_learns_a_text():
    """All three losses together, boundaries drawn."""
    model, ids = make(boundary_weight=0.1).train(), batch(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(40):
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < losses[0] - 1
