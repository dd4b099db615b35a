"""One full forward = one-token decode = any chunking, with any cache."""

import copy
import io

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.exactness.conftest import Trace, assert_same_logits, full_forward


@torch.no_grad()
def in_chunks(model, ids, sizes, cache=None, **kwargs):
    """Logits and rows of forwards over chunks of the given sizes."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    logits, at = [], 0
    with Trace(model) as trace:
        for size in sizes:
            logits.append(model(input_ids=ids[:, at : at + size], past_key_values=cache, **kwargs).logits)
            at += size
    assert at == ids.shape[1]
    return torch.cat(logits, dim=1), trace, cache


def random_sizes(total, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(int(torch.randint(1, 8, (), generator=generator)), total - sum(sizes)))
    return sizes


def assert_same(model, ids, sizes, **kwargs):
    expected, rows = full_forward(model, ids)
    logits, trace, _ = in_chunks(model, ids, sizes, **kwargs)
    assert_same_logits(logits, expected)
    for layer, expected_rows in rows.items():
        assert torch.equal(trace.all_rows(layer), expected_rows)


def test_one_token_decode(model, ids):
    assert_same(model, ids, [10] + [1] * 14)


def test_from_the_first_token(model, ids):
    assert_same(model, ids, [1] * 24)


@pytest.mark.parametrize("seed", range(4))
def test_chunked_prefill(model, ids, seed):
    assert_same(model, ids, random_sizes(24, seed))


def test_lazy_cache(model, ids):
    """A DynamicCache that was made without a config has no layers yet."""
    assert_same(model, ids, [10] + [1] * 14, cache=DynamicCache())


def test_static_cache(model, ids):
    assert_same(model, ids, [10, 3] + [1] * 11, cache=StaticCache(model.config, max_cache_len=40))


@pytest.mark.parametrize("sizes", [[8, 16], [8] + [1] * 16])
def test_both_attention_modes(model, ids, sizes):
    for absorb in (True, False):
        for layer in model.model.layers:
            layer.attention.absorb = absorb
        assert_same(model, ids, sizes)


def test_serialized_and_continued(model, ids):
    expected, _ = full_forward(model, ids)
    _, _, cache = in_chunks(model, ids[:, :11], [7, 4])
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    for continued in (torch.load(buffer, weights_only=False), copy.deepcopy(cache)):
        logits, _, _ = in_chunks(model, ids[:, 11:], [1, 12], cache=continued)
        assert_same_logits(logits, expected[:, 11:])


def test_rows_selected_and_repeated(model, ids):
    expected, _ = full_forward(model, ids)
    _, _, cache = in_chunks(model, ids[:, :11], [11])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 2]))
    logits, _, _ = in_chunks(model, ids[[2, 0, 1], 11:], [1, 12], cache=cache)
    assert_same_logits(logits, expected[[2, 0, 1], 11:])
    cache.reorder_cache(torch.tensor([1, 1, 2]))
    more = torch.tensor([[5, 6, 7]]).expand(3, -1)
    logits, _, _ = in_chunks(model, more, [2, 1], cache=cache)
    expected, _ = full_forward(model, torch.cat([ids[[0, 0, 1]], more], dim=1))
    assert_same_logits(logits, expected[:, 24:])


def test_reset(model, ids):
    expected, _ = full_forward(model, ids)
    cache = StaticCache(model.config, max_cache_len=40)
    in_chunks(model, ids[:2], [24], cache=cache)
    cache.reset()
    logits, _, _ = in_chunks(model, ids[1:], [11, 13], cache=cache)
    assert_same_logits(logits, expected[1:])


@pytest.mark.parametrize("back", [1, 4, 9])
def test_rollback(model, ids, back):
    """What is taken back leaves no trace, also when it is taken back in parts and deeper than one forward."""
    expected, _ = full_forward(model, ids)
    _, _, cache = in_chunks(model, ids[:, :10], [10])
    cache.activate_past_recording()
    wrong = (ids[:, 10:20] * 7 + 1) % 20
    in_chunks(model, torch.cat([ids[:, 10:12], wrong[:, : back - 1]], dim=1), [2] + [1] * (back - 1), cache=cache)
    if back > 1:
        cache.crop(-1)
        in_chunks(model, wrong[:, :1], [1], cache=cache)
    cache.crop(-back)
    assert cache.get_seq_length() == 11
    logits, _, _ = in_chunks(model, ids[:, 11:], [3, 1, 9], cache=cache)
    assert_same_logits(logits, expected[:, 11:])


REFUSED = {
    "crop, nothing recorded": (lambda cache: cache.crop(-1), 0),
    "crop beyond what is recorded": (lambda cache: cache.crop(tokens_to_remove=-6), 5),
    "crop to a length beyond it": (lambda cache: cache.crop(4), 5),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([0, 1, 3])), 5),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([0, 3])), 0),
}


@pytest.mark.parametrize(("change", "recorded"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_the_cache_as_it_was(model, ids, change, recorded):
    expected, _ = full_forward(model, ids)
    _, _, cache = in_chunks(model, ids[:, : 10 - recorded], [10 - recorded])
    if recorded:
        cache.activate_past_recording()
        in_chunks(model, ids[:, 10 - recorded : 10], [recorded], cache=cache)
    before = copy.deepcopy(cache)
    with pytest.raises((RuntimeError, IndexError)):
        change(cache)
    for layer, other in zip(cache.layers[:-1], before.layers[:-1], strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)
    tails, others = cache.layers[-1].tails, before.layers[-1].tails
    assert all(torch.equal(tail, others[name]) for name, tail in tails.items())
    logits, _, _ = in_chunks(model, ids[:, 10:], [1, 13], cache=cache)
    assert_same_logits(logits, expected[:, 10:])


def test_crop_to_a_length(model, ids):
    expected, _ = full_forward(model, ids)
    _, _, cache = in_chunks(model, ids[:, :7], [7])
    cache.activate_past_recording()
    in_chunks(model, ids[:, 7:12], [5], cache=cache)
    cache.crop(30)  # it is shorter
    assert cache.get_seq_length() == 12
    cache.crop(9)
    assert cache.get_seq_length() == 9
    logits, _, _ = in_chunks(model, ids[:, 9:], [15], cache=cache)
    assert_same_logits(logits, expected[:, 9:])
