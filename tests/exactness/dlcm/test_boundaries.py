"""Padding leaves no trace and packed documents do not see each other, with a cache and without."""

import pytest
import torch
from transformers import DynamicCache

from tests.exactness.dlcm.conftest import LENGTH, assert_same, assert_same_boundaries, full_forward, in_chunks, state_of
from tests.exactness.test_boundaries import LENGTHS, packed, padded
from tests.exactness.test_cached import random_sizes


def assert_row_same(model, logits, boundaries, alone, kept=slice(None)) -> None:
    assert_same_boundaries(model, boundaries, alone.probabilities[0, kept], alone.boundaries[0, kept])
    torch.testing.assert_close(logits, alone.logits[0, kept], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("explicit_positions", [True, False])
def test_padding(model, ids, side, explicit_positions):
    batch, mask, places = padded(ids, side)
    positions = (mask.cumsum(1) - 1).clamp_min(0) if explicit_positions else None
    run = full_forward(model, batch, attention_mask=mask, position_ids=positions)
    assert not run.boundaries[mask == 0].any() and not run.probabilities[mask == 0].any()
    assert run.logits.isfinite().all()
    for row, (length, place) in enumerate(zip(LENGTHS, places, strict=True)):
        alone = full_forward(model, ids[row : row + 1, :length])
        assert_row_same(model, run.logits[row, place], run.boundaries[row, place], alone)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_prefill_and_decode(model, ids, side):
    """Each row goes on after its padded prompt as if it were alone: right padding leaves holes in the cache."""
    batch, mask, _ = padded(ids, side)
    cache = DynamicCache(config=model.config)
    model(input_ids=batch, attention_mask=mask, past_key_values=cache)
    more = torch.tensor([[5, 6, 7, 5]]).expand(3, -1)
    outputs = []
    for step, size in ((0, 1), (1, 1), (2, 2)):
        mask = torch.cat([mask, mask.new_ones(3, size)], dim=1)
        outputs.append(model(input_ids=more[:, step : step + size], attention_mask=mask, past_key_values=cache))
    logits = torch.cat([out.logits for out in outputs], dim=1)
    boundaries = torch.cat([out.boundaries for out in outputs], dim=1)
    for row, length in enumerate(LENGTHS):
        alone = full_forward(model, torch.cat([ids[row, :length], more[row]])[None])
        assert_row_same(model, logits[row], boundaries[row], alone, slice(length, None))
        assert state_of(cache).lengths[row] == alone.boundaries.sum()


@pytest.mark.parametrize("garbage", [-100, 64, 2**40])
def test_what_is_under_padding_does_not_matter(model, ids, garbage):
    batch, mask, _ = padded(ids, "right")
    spoiled = torch.where(mask.bool(), batch, garbage)
    clean, run = (full_forward(model, x, attention_mask=mask) for x in (batch, spoiled))
    assert torch.equal(run.boundaries, clean.boundaries)
    torch.testing.assert_close(run.logits[mask.bool()], clean.logits[mask.bool()], atol=1e-6, rtol=0)


@pytest.mark.parametrize("with_mask", [True, False])
def test_packed_documents(model, ids, with_mask):
    documents, row, positions = packed(ids)
    mask = torch.ones_like(row) if with_mask else None
    run = full_forward(model, row, position_ids=positions, attention_mask=mask)
    apart = [full_forward(model, document[None]) for document in documents]
    assert torch.equal(run.boundaries, torch.cat([part.boundaries for part in apart], dim=1))
    torch.testing.assert_close(run.logits, torch.cat([part.logits for part in apart], dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(2))
def test_packed_documents_with_a_cache(model, ids, seed):
    _, row, positions = packed(ids)
    whole = full_forward(model, row, position_ids=positions)
    for sizes in (random_sizes(LENGTH, seed), [1] * LENGTH):
        run, _ = in_chunks(model, row, sizes, positions=positions, masked=bool(seed))
        assert_same(model, run, whole)


def test_rows_of_other_documents_and_padding(model, ids):
    """Documents that start at different steps in the rows of one batch, padding before, behind and all along."""
    _, row, positions = packed(ids)
    batch = torch.zeros(3, LENGTH + 6, dtype=torch.long)
    mask, places = torch.zeros_like(batch), torch.zeros_like(batch)
    for index, shift in enumerate((0, 4)):
        batch[index, shift : shift + LENGTH], places[index, shift : shift + LENGTH] = row[0], positions[0]
        mask[index, shift : shift + LENGTH] = 1
    run = full_forward(model, batch, position_ids=places, attention_mask=mask)
    alone = full_forward(model, row, position_ids=positions)
    for index, shift in enumerate((0, 4)):
        kept = slice(shift, shift + LENGTH)
        assert_row_same(model, run.logits[index, kept], run.boundaries[index, kept], alone)
    assert not run.boundaries[2].any() and run.logits.isfinite().all()


def test_positions_are_relative(model, ids):
    """A document may begin at any position, and every token may be a document."""
    whole = full_forward(model, ids)
    shifted = full_forward(model, ids, position_ids=torch.arange(5, LENGTH + 5)[None])
    assert_same(model, shifted, whole)
    alone = full_forward(model, ids, position_ids=torch.zeros_like(ids))
    assert alone.boundaries.all()
    each = full_forward(model, ids.reshape(-1, 1))
    torch.testing.assert_close(alone.logits.flatten(0, 1), each.logits[:, 0], atol=1e-5, rtol=0)


def test_forced_boundaries_under_padding_are_none(model, ids):
    batch, mask, _ = padded(ids, "left")
    run = full_forward(model, batch, attention_mask=mask, boundaries=torch.ones_like(ids, dtype=torch.bool))
    assert torch.equal(run.boundaries, mask.bool())


@torch.no_grad()
def test_the_last_document_goes_on_without_position_ids(model, ids):
    documents, row, positions = packed(ids)
    _, cache = in_chunks(model, row, [LENGTH], positions=positions)
    run, _ = in_chunks(model, ids[:1, :5], [1, 4], cache=cache)
    whole = full_forward(model, torch.cat([documents[-1][None], ids[:1, :5]], dim=1))
    assert_same(model, run, whole, slice(-5, None))


def test_gradients_of_packed_documents(model, ids, forced):
    """In float64: the signed root of a gate is steep near zero, and enlarges float32's rounding to 1e-4."""
    model.double()
    documents, row, positions = packed(ids)
    cuts = torch.tensor([len(document) for document in documents]).cumsum(0)[:-1].tolist()
    boundaries = forced[:1].tensor_split(cuts, dim=1)

    def gradients(batches):
        model.zero_grad()
        for inputs in batches:
            out = model(**inputs, use_cache=False)
            (out.logits.square().sum() + out.boundary_probabilities.square().sum()).backward()
        memories = () if model.memory_stack is None else model.memory_stack.items()
        rows = [memory.lookup.pending.take() for _, memory in memories]
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, rows

    together, rows = gradients([{"input_ids": row, "position_ids": positions, "boundaries": forced[:1]}])
    apart, rows_apart = gradients(
        [{"input_ids": d[None], "boundaries": b} for d, b in zip(documents, boundaries, strict=True)]
    )
    assert together.keys() == apart.keys()
    for (ours, sums), (theirs, their_sums) in zip(rows, rows_apart, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(sums, their_sums, atol=1e-6, rtol=1e-6)
    for name, gradient in together.items():
        # Rotations, rows and router are float32 all the same: 1.1e-6 was seen.
        assert (gradient - apart[name]).abs().max() <= 2e-6 * gradient.abs().max().clamp_min(1), name
