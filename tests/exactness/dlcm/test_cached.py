"""One full forward = one-token decode = any chunking, with any cache; and the concept transformer runs for concepts."""

import copy
import io

import pytest
import torch
from transformers import DynamicCache, StaticCache

from byrote.memory.concept_state import NOWHERE
from tests.exactness.dlcm.conftest import LENGTH, VARIANTS, assert_same, build, full_forward, in_chunks, state_of
from tests.exactness.test_cached import random_sizes


def check(model, ids, sizes, **kwargs):
    whole = full_forward(model, ids)
    run, cache = in_chunks(model, ids, sizes, **kwargs)
    assert_same(model, run, whole)
    return run, cache


@pytest.mark.parametrize("prefill", [10, 1])
def test_one_token_decode(model, ids, prefill):
    """And it thinks only where a concept forms, for the rows in which one does."""
    run, cache = check(model, ids, [prefill] + [1] * (LENGTH - prefill))
    quiet = 0
    for step, (rows, concepts) in enumerate(run.shapes[1:], start=prefill):
        forming = int(run.boundaries[:, step].sum())
        assert rows == forming and concepts == (forming > 0), (step, rows, concepts)
        quiet += forming == 0
    assert quiet, "every step formed a concept: choose another seed"
    assert sum(run.concepts) == run.boundaries.sum()
    assert_invariants(cache, run.boundaries, LENGTH)


def taken_in(buffer, lengths):
    return torch.arange(buffer.shape[1]) < lengths[:, None]


def assert_invariants(cache, boundaries, length):
    state = state_of(cache)
    assert cache.get_seq_length() == length
    assert all(layer.keys.shape[2] == length for layer in cache.layers[:-1])
    assert torch.equal(state.lengths, boundaries.sum(dim=1))
    most = int(state.lengths.max())
    taken = taken_in(state.slots["document"][:, :most], state.lengths)
    assert torch.equal(state.slots["document"] != NOWHERE, taken_in(state.slots["document"], state.lengths))
    for name, buffer in state.slots.items():
        if name in ("document", "position", "smoothed"):  # the last is kept only while recording
            continue
        written = (buffer[:, 0] if buffer.dim() == 4 else buffer).abs().sum(dim=-1) != 0
        assert written[:, :most][taken].all(), name
    for row, length_of_row in enumerate(state.lengths.tolist()):
        formed = state.slots["position"][row, :length_of_row]
        assert torch.equal(formed, boundaries[row].nonzero().squeeze(1))


@pytest.mark.parametrize("seed", range(2))
def test_chunked_prefill(model, ids, seed):
    run, cache = check(model, ids, random_sizes(LENGTH, seed), masked=seed == 1)
    assert sum(run.concepts) == run.boundaries.sum()
    assert_invariants(cache, run.boundaries, LENGTH)


def test_forced_boundaries(model, ids, forced):
    whole = full_forward(model, ids, boundaries=forced)
    assert torch.equal(whole.boundaries[:, 1:], forced[:, 1:]) and whole.boundaries[:, 0].all()
    for sizes in ([1] * LENGTH, [7, 9, 8]):
        run, _ = in_chunks(model, ids, sizes, boundaries=forced)
        assert_same(model, run, whole)


def test_lazy_cache(model, ids):
    check(model, ids, [10] + [1] * 14, cache=DynamicCache())


def test_static_cache(model, ids):
    check(model, ids, [10, 3] + [1] * 11, cache=StaticCache(model.config, max_cache_len=40))


def test_more_concepts_than_the_first_buffers_hold(model):
    ids = torch.randint(3, 20, (2, 75), generator=torch.Generator().manual_seed(1))
    boundaries = torch.rand(2, 75, generator=torch.Generator().manual_seed(2)) < torch.tensor([[0.95], [0.1]])
    whole = full_forward(model, ids, boundaries=boundaries)
    run, cache = in_chunks(model, ids, [30] + [1] * 12 + [33], boundaries=boundaries)
    assert_same(model, run, whole)
    assert state_of(cache).lengths.max() > 64
    assert_invariants(cache, whole.boundaries, 75)


@pytest.mark.parametrize("absorb", [True, False])
def test_both_ways_of_latent_attention(ids, absorb):
    model = build(**VARIANTS["deepseek"])
    for layer in [*model.model.encoder, *model.model.concepts.layers, *model.model.decoder]:
        layer.attention.absorb = absorb
    check(model, ids, [8] + [1] * 16)


def test_serialized_and_continued(model, ids):
    whole = full_forward(model, ids)
    _, cache = in_chunks(model, ids[:, :11], [7, 4])
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    for continued in (torch.load(buffer, weights_only=False), copy.deepcopy(cache), cache):
        run, _ = in_chunks(model, ids[:, 11:], [1, 12], cache=continued)
        assert_same(model, run, whole, slice(11, None))


def test_rows_selected_repeated_and_reordered(model, ids):
    whole = full_forward(model, ids)
    _, cache = in_chunks(model, ids[:, :11], [11])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 0, 2]))
    run, _ = in_chunks(model, ids[[2, 0, 1], 11:], [1, 12], cache=cache)
    torch.testing.assert_close(run.logits, whole.logits[[2, 0, 1], 11:], atol=1e-5, rtol=0)
    cache.reorder_cache(torch.tensor([1, 1, 2]))
    more = torch.tensor([[5, 6, 7]]).expand(3, -1)
    run, cache = in_chunks(model, more, [2, 1], cache=cache)
    whole = full_forward(model, torch.cat([ids[[0, 0, 1]], more], dim=1))
    assert_same(model, run, whole, slice(LENGTH, None))
    assert_invariants(cache, whole.boundaries, LENGTH + 3)


def test_reset(model, ids):
    whole = full_forward(model, ids)
    cache = StaticCache(model.config, max_cache_len=40)
    in_chunks(model, ids[:2], [24], cache=cache)
    cache.reset()
    run, _ = in_chunks(model, ids[1:], [11, 13], cache=cache)
    torch.testing.assert_close(run.logits, whole.logits[1:], atol=1e-5, rtol=0)


def test_a_cache_filled_in_another_mode(model, ids):
    """Under inference_mode, no_grad and with gradients in turn: in-place writes may not cross them."""
    whole = full_forward(model, ids)
    cache, logits, at = DynamicCache(config=model.config), [], 0
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            for size in (1, 5, 2):
                logits.append(model(input_ids=ids[:, at : at + size], past_key_values=cache).logits.clone())
                at += size
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, atol=1e-5, rtol=0)


def test_gradients_through_a_cache(model, ids, forced):
    """Two chunks with gradients on = one forward with gradients on."""
    model.double()

    def gradients(sizes):
        model.zero_grad()
        cache, loss, at = None if len(sizes) == 1 else DynamicCache(config=model.config), 0.0, 0
        for size in sizes:
            chunk = slice(at, at + size)
            inputs = {"input_ids": ids[:, chunk], "boundaries": forced[:, chunk], "use_cache": cache is not None}
            loss = loss + model(**inputs, past_key_values=cache).logits.square().sum()
            at += size
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole, parts = gradients([LENGTH]), gradients([9, 1, 14])
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():  # rotations, experts' shares and rows are float32
        assert (parts[name] - gradient).abs().max() <= 2e-6 * gradient.abs().max().clamp_min(1), name
