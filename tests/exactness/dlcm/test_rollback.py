"""What is taken back leaves no trace: over no, one and two boundaries, different for every row, and in parts."""

import pytest
import torch
from transformers import DynamicCache

from tests.exactness.dlcm.conftest import LENGTH, assert_same, full_forward, in_chunks, state_of
from tests.exactness.dlcm.test_cached import assert_invariants


def wrong(ids):
    return (ids * 7 + 1) % 20


@pytest.mark.parametrize(("sizes", "parts"), [((5,), (5,)), ((2, 1, 2), (1, 3, 1))])
def test_over_none_one_and_two_boundaries(model, ids, forced, sizes, parts):
    """Recording begins after 12 tokens; the last five of 24 are taken back, and others come in their place."""
    cut = LENGTH - 5
    assert forced[:, cut:].sum(dim=1).tolist() == [0, 1, 2]
    _, cache = in_chunks(model, ids[:, :12], [12], boundaries=forced[:, :12])
    cache.activate_past_recording()
    in_chunks(model, ids[:, 12:], [4, 3, *sizes], cache=cache, boundaries=forced[:, 12:])
    for back in parts:
        cache.crop(-back)
    whole = full_forward(model, ids[:, :cut], boundaries=forced[:, :cut])
    assert_invariants(cache, whole.boundaries, cut)
    continued = torch.cat([ids[:, :cut], wrong(ids[:, :5])], dim=1)
    run, cache = in_chunks(model, continued[:, cut:], [1, 1, 3], cache=cache)
    boundaries = torch.cat([whole.boundaries, run.boundaries], dim=1)
    again = full_forward(model, continued, boundaries=boundaries)
    assert_same(model, run, again, slice(cut, None))
    assert_invariants(cache, boundaries, LENGTH)


@pytest.mark.parametrize("back", [1, 4, 9])
def test_by_the_models_own_boundaries(model, ids, back):
    whole = full_forward(model, ids)
    _, cache = in_chunks(model, ids[:, :10], [10])
    cache.activate_past_recording()
    others = wrong(ids[:, 10:20])
    in_chunks(model, torch.cat([ids[:, 10:12], others[:, : back - 1]], dim=1), [2] + [1] * (back - 1), cache=cache)
    if back > 1:
        cache.crop(-1)
        in_chunks(model, others[:, :1], [1], cache=cache)
    cache.crop(-back)
    assert cache.get_seq_length() == 11
    run, _ = in_chunks(model, ids[:, 11:], [3, 1, 9], cache=cache)
    assert_same(model, run, whole, slice(11, None))


def test_back_to_an_empty_cache(model, ids):
    whole = full_forward(model, ids)
    cache = DynamicCache(config=model.config)
    model.attach_memory_state(cache).activate_past_recording()
    in_chunks(model, wrong(ids[:, :6]), [4, 2], cache=cache)
    cache.crop(-6)
    assert cache.get_seq_length() == 0 and not state_of(cache).lengths.any()
    run, _ = in_chunks(model, ids, [1, 3, 20], cache=cache)
    assert_same(model, run, whole)


def test_rows_moved_while_recording(model, ids):
    order = torch.tensor([2, 0, 0])
    whole = full_forward(model, ids[order])
    _, cache = in_chunks(model, ids[:, :8], [8])
    cache.activate_past_recording()
    in_chunks(model, ids[:, 8:11], [3], cache=cache)
    in_chunks(model, wrong(ids[:, 11:14]), [1, 2], cache=cache)
    cache.reorder_cache(order)
    cache.crop(-4)
    run, _ = in_chunks(model, ids[order, 10:], [2, 12], cache=cache)
    assert_same(model, run, whole, slice(10, None))


def test_of_a_padded_batch(model, ids):
    """Right padding in the cache, left padding in what is taken back."""
    lengths = (9, 5, 1)
    prompt, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        prompt[row, :length], mask[row, :length] = ids[row, :length], 1
    cache = DynamicCache(config=model.config)
    model.attach_memory_state(cache).activate_past_recording()
    with torch.no_grad():
        model(input_ids=prompt, attention_mask=mask, past_key_values=cache)
        more = torch.cat([mask, mask.new_ones(3, 4)], dim=1)
        model(input_ids=wrong(ids[:, :4]), attention_mask=more, past_key_values=cache)
        cache.crop(-4)
        out = model(input_ids=ids[:, 9:13], attention_mask=more, past_key_values=cache)
    for row, length in enumerate(lengths):
        alone = full_forward(model, torch.cat([ids[row, :length], ids[row, 9:13]])[None])
        assert torch.equal(out.boundaries[row], alone.boundaries[0, length:])
        torch.testing.assert_close(out.logits[row], alone.logits[0, length:], atol=1e-5, rtol=0)


def test_over_the_start_of_a_document(model, ids):
    documents = [ids[0, :9], ids[1, :1], ids[2, :14]]
    row, positions = torch.cat(documents)[None], torch.cat([torch.arange(len(d)) for d in documents])[None]
    whole = full_forward(model, row, position_ids=positions)
    _, cache = in_chunks(model, row[:, :6], [6], positions=positions[:, :6])
    cache.activate_past_recording()
    in_chunks(model, row[:, 6:13], [4, 3], cache=cache, positions=positions[:, 6:13])
    for back in (2, 2, 1):
        cache.crop(-back)
    run, _ = in_chunks(model, row[:, 8:], [16], cache=cache, positions=positions[:, 8:])
    assert_same(model, run, whole, slice(8, None))


def test_without_recording_it_is_refused_and_changes_nothing(model, ids):
    whole = full_forward(model, ids)
    _, cache = in_chunks(model, ids[:, :18], [18])
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)
    run, _ = in_chunks(model, ids[:, 18:], [1, 5], cache=cache)
    assert_same(model, run, whole, slice(18, None))
