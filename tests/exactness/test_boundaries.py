"""Padding leaves no trace and packed documents do not see each other, with a cache and without."""

import pytest
import torch
from transformers import DynamicCache

from tests.exactness.conftest import assert_same_logits, full_forward
from tests.exactness.test_cached import random_sizes

LENGTHS = (24, 17, 3)


def padded(ids, side):
    """Rows cut to LENGTHS and padded: ids, mask, and where the real tokens are."""
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    places = []
    for row, length in enumerate(LENGTHS):
        place = slice(24 - length, 24) if side == "left" else slice(0, length)
        batch[row, place], mask[row, place] = ids[row, :length], 1
        places.append(place)
    return batch, mask, places


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("explicit_positions", [True, False])
def test_padding(model, ids, side, explicit_positions):
    batch, mask, places = padded(ids, side)
    positions = (mask.cumsum(1) - 1).clamp_min(0) if explicit_positions else None
    logits, rows = full_forward(model, batch, attention_mask=mask, position_ids=positions)
    for row, (length, place) in enumerate(zip(LENGTHS, places, strict=True)):
        expected, expected_rows = full_forward(model, ids[row : row + 1, :length])
        assert_same_logits(logits[row, place], expected[0])
        for layer in rows:
            assert torch.equal(rows[layer][row, place], expected_rows[layer][0])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_prefill_and_decode(model, ids, side):
    """Each row goes on after its padded prompt as if it were alone: right padding leaves holes in the cache."""
    batch, mask, _ = padded(ids, side)
    cache = DynamicCache(config=model.config)
    model(input_ids=batch, attention_mask=mask, past_key_values=cache)
    more = torch.tensor([[5, 6, 7, 5]]).expand(3, -1)
    logits = []
    for step, size in ((0, 1), (1, 1), (2, 2)):
        mask = torch.cat([mask, mask.new_ones(3, size)], dim=1)
        out = model(input_ids=more[:, step : step + size], attention_mask=mask, past_key_values=cache)
        logits.append(out.logits)
    logits = torch.cat(logits, dim=1)
    for row, length in enumerate(LENGTHS):
        expected, _ = full_forward(model, torch.cat([ids[row, :length], more[row]])[None])
        assert_same_logits(logits[row], expected[0, length:])


def packed(ids):
    """One row of three documents, and their position ids."""
    documents = [ids[0, :9], ids[1, :1], ids[2, :14]]
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    return documents, torch.cat(documents)[None], positions[None]


@pytest.mark.parametrize("with_mask", [True, False])
def test_packed_documents(model, ids, with_mask):
    documents, row, positions = packed(ids)
    mask = torch.ones_like(row) if with_mask else None
    logits, rows = full_forward(model, row, position_ids=positions, attention_mask=mask)
    expected = [full_forward(model, document[None]) for document in documents]
    assert_same_logits(logits, torch.cat([logits for logits, _ in expected], dim=1))
    for layer in rows:
        assert torch.equal(rows[layer], torch.cat([document[layer] for _, document in expected], dim=1))


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_packed_documents_with_a_cache(model, ids, seed):
    documents, row, positions = packed(ids)
    expected = torch.cat([full_forward(model, document[None])[0] for document in documents], dim=1)
    for sizes in (random_sizes(24, seed), [1] * 24):
        cache, logits, at = DynamicCache(config=model.config), [], 0
        for size in sizes:
            chunk = slice(at, at + size)
            mask = torch.ones(1, at + size, dtype=torch.long) if seed % 2 else None
            out = model(
                input_ids=row[:, chunk], position_ids=positions[:, chunk], attention_mask=mask, past_key_values=cache
            )
            logits.append(out.logits)
            at += size
        assert_same_logits(torch.cat(logits, dim=1), expected)


@torch.no_grad()
def test_the_last_document_goes_on_without_position_ids(model, ids):
    documents, row, positions = packed(ids)
    cache = DynamicCache(config=model.config)
    model(input_ids=row, position_ids=positions, past_key_values=cache)
    more = ids[:1, :5]
    logits = [model(input_ids=part, past_key_values=cache).logits for part in more.split([1, 4], dim=1)]
    expected, _ = full_forward(model, torch.cat([documents[-1][None], more], dim=1))
    assert_same_logits(torch.cat(logits, dim=1), expected[:, -5:])


@torch.no_grad()
def test_rollback_over_a_boundary(model, ids):
    documents, row, positions = packed(ids)
    expected = torch.cat([full_forward(model, document[None])[0] for document in documents], dim=1)
    cache = DynamicCache(config=model.config)
    model(input_ids=row[:, :6], position_ids=positions[:, :6], past_key_values=cache)
    cache.activate_past_recording()
    for chunk in (slice(6, 10), slice(10, 13)):
        model(input_ids=row[:, chunk], position_ids=positions[:, chunk], past_key_values=cache)
    for back in (2, 2, 1):
        cache.crop(-back)
    out = model(input_ids=row[:, 8:], position_ids=positions[:, 8:], past_key_values=cache)
    assert_same_logits(out.logits, expected[:, 8:])


def test_gradients_of_packed_documents(model, ids):
    """In float64: the signed root of a gate is steep near zero, and enlarges float32's rounding to 1e-4."""
    model.double()
    documents, row, positions = packed(ids)

    def gradients(batches):
        model.zero_grad()
        for inputs in batches:
            model(**inputs, use_cache=False).logits.square().sum().backward()
        rows = [memory.lookup.pending.take() for _, memory in model.model.memories.items()]
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], rows

    together, rows_together = gradients([{"input_ids": row, "position_ids": positions}])
    apart, rows_apart = gradients([{"input_ids": document[None]} for document in documents])
    for (ids_together, sums_together), (ids_apart, sums_apart) in zip(rows_together, rows_apart, strict=True):
        assert torch.equal(ids_together, ids_apart)
        together.append(sums_together)
        apart.append(sums_apart)
    for ours, theirs in zip(together, apart, strict=True):
        # Rows, router and row gradients are float32 all the same.
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max().clamp_min(1)


def test_padding_inside_a_document_is_refused(model, ids):
    """Memory windows cannot look through a hole that one forward is given; a new document behind it is fine."""
    mask = torch.ones_like(ids)
    mask[1, 9] = 0
    with pytest.raises(ValueError, match="row 1 goes on at token 10"):
        model(input_ids=ids, attention_mask=mask)
    positions = torch.arange(24).expand(3, -1).clone()
    positions[1, 10:] -= 10
    logits, _ = full_forward(model, ids, attention_mask=mask, position_ids=positions)
    expected, _ = full_forward(model, ids[1:2, 10:])
    assert_same_logits(logits[1:2, 10:], expected)
