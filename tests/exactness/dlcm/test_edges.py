"""Texts of one token, of one concept, of a concept a token, of none; thresholds hit exactly; vectors of no length."""

import pytest
import torch
from transformers import DynamicCache

from tests.exactness.dlcm.conftest import (
    LENGTH,
    VARIANTS,
    assert_same,
    build,
    full_forward,
    in_chunks,
    state_of,
)
from tests.exactness.dlcm.test_cached import assert_invariants


def test_one_token(model, ids):
    whole = full_forward(model, ids[:, :1])
    assert whole.boundaries.all() and (whole.probabilities == 1).all() and whole.logits.isfinite().all()
    assert_same(model, whole, full_forward(model, ids), slice(1))
    run, cache = in_chunks(model, ids[:, :1], [1])
    assert_same(model, run, whole)
    assert_invariants(cache, whole.boundaries, 1)


@pytest.mark.parametrize("every", [True, False], ids=["a concept a token", "one concept"])
def test_extremes(model, ids, every):
    boundaries = torch.full_like(ids, every, dtype=torch.bool)
    whole = full_forward(model, ids, boundaries=boundaries)
    assert (whole.boundaries.sum(dim=1) == (LENGTH if every else 1)).all() and whole.logits.isfinite().all()
    for sizes in ([1] * LENGTH, [5, 19]):
        run, cache = in_chunks(model, ids, sizes, boundaries=boundaries)
        assert_same(model, run, whole)
        assert_invariants(cache, whole.boundaries, LENGTH)


def test_extremes_in_the_rows_of_one_batch(model, ids):
    boundaries = torch.zeros_like(ids, dtype=torch.bool)
    boundaries[1] = True
    whole = full_forward(model, ids, boundaries=boundaries)
    for row in range(3):
        alone = full_forward(model, ids[row : row + 1], boundaries=boundaries[row : row + 1])
        torch.testing.assert_close(alone.logits[0], whole.logits[row], atol=1e-5, rtol=0)
    run, _ = in_chunks(model, ids, [4] + [1] * 20, boundaries=boundaries)
    assert_same(model, run, whole)


def test_a_boundary_on_the_last_token_of_the_prompt(model, ids):
    boundaries = torch.zeros_like(ids, dtype=torch.bool)
    boundaries[:, 9] = boundaries[0, 10] = True
    whole = full_forward(model, ids, boundaries=boundaries)
    run, _ = in_chunks(model, ids, [10, 1, 13], boundaries=boundaries)
    assert_same(model, run, whole)


@pytest.mark.parametrize("variant", ["paper", "paper, open", "deepseek"])
def test_probabilities_of_exactly_one_half(variant, ids):
    """Of projections without length: the cosine is 0, p is 1/2, and that is a boundary."""
    model = build(**{**VARIANTS[variant], "boundary_threshold": 0.5})
    torch.nn.init.zeros_(model.model.concepts.boundary.query.weight)
    whole = full_forward(model, ids)
    assert whole.boundaries.all() and (whole.probabilities[:, 1:] == 0.5).all() and whole.logits.isfinite().all()
    run, _ = in_chunks(model, ids, [1] * LENGTH)
    assert_same(model, run, whole)


@pytest.mark.parametrize("mode", ["decoupled", "e2e", "rule"])
def test_gradients_of_vectors_without_length(mode, ids):
    model = build(boundary_mode=mode).train()
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)])
def test_padding_alone(model, ids, rows):
    """A row of padding beside rows of text, and a batch of nothing else; then text comes to it all."""
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[list(rows)] = 0
    run = full_forward(model, ids[:, :6], attention_mask=mask)
    assert run.logits.isfinite().all() and not run.boundaries[list(rows)].any()
    cache = DynamicCache(config=model.config)
    outputs = []
    with torch.no_grad():
        model(input_ids=ids[:, :6], attention_mask=mask, past_key_values=cache)
        for step in range(6, 12):
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
            inputs = {"input_ids": ids[:, step : step + 1], "attention_mask": mask}
            outputs.append(model(**inputs, past_key_values=cache))
    for row in range(3):
        begin = 6 if row in rows else 0
        alone = full_forward(model, ids[row : row + 1, begin:12])
        assert torch.equal(torch.cat([out.boundaries[row] for out in outputs]), alone.boundaries[0, 6 - begin :])
        logits = torch.cat([out.logits[row] for out in outputs])
        torch.testing.assert_close(logits, alone.logits[0, 6 - begin :], atol=1e-5, rtol=0)
        assert state_of(cache).lengths[row] == alone.boundaries.sum()


@pytest.mark.parametrize("mode", ["decoupled", "e2e", "rule"])
def test_a_loss_of_padding_alone(ids, mode):
    model = build(boundary_mode=mode).train()
    labels = torch.full_like(ids, -100)
    inputs = {"attention_mask": torch.zeros_like(ids), "labels": labels, "num_items_in_batch": torch.tensor(5)}
    loss = model(input_ids=ids, **inputs).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_text_shorter_than_one_concept(model, ids):
    """All it has is what its first token forms."""
    boundaries = torch.zeros(3, 3, dtype=torch.bool)
    whole = full_forward(model, ids[:, :3], boundaries=boundaries)
    assert (whole.boundaries.sum(dim=1) == 1).all()
    run, cache = in_chunks(model, ids[:, :3], [1, 2], boundaries=boundaries)
    assert_same(model, run, whole)
    opens = model.config.boundary_convention == "open"
    assert (state_of(cache).open_count == (3 if opens else 2)).all()


def test_multiplicities_sum_to_the_tokens(model, ids):
    """Each token counts for one concept, the newest that it sees."""
    seen = []
    hook = model.model.concepts.read.register_forward_pre_hook(lambda module, args: seen.append(args[3]))
    run = full_forward(model, ids)
    hook.remove()
    counts = (seen[0].multiplicity() * seen[0].visible()).sum(dim=-1)
    assert torch.equal(counts, torch.arange(1, LENGTH + 1).expand(3, -1))
    assert torch.equal(seen[0].newest(), run.boundaries.cumsum(dim=1) - 1)
