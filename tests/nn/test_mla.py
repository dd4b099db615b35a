import pytest
import torch

from byrote.nn.mla import MLA
from byrote.nn.rope import rotary

HIDDEN, ROPE = 32, 8


def build(q_lora_rank=None, kv_lora_rank=16):
    torch.manual_seed(0)
    layer = MLA(HIDDEN, 4, q_lora_rank, kv_lora_rank, 12, ROPE, 10)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return layer


def angles(batch, start, stop):
    return rotary(torch.arange(start, stop).expand(batch, -1), ROPE)


class Past:
    """A cache that grows."""

    def __init__(self):
        self.parts = []

    def __call__(self, latent, rope_key):
        self.parts.append((latent, rope_key))
        latents, rope_keys = zip(*self.parts, strict=True)
        return torch.cat(latents, dim=2), torch.cat(rope_keys, dim=2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_absorbed_equals_expanded(q_lora_rank, masked):
    layer = build(q_lora_rank)
    x, upstream = torch.randn(3, 9, HIDDEN), torch.randn(3, 9, HIDDEN)
    mask = (torch.rand(3, 1, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool) if masked else None
    results = []
    for layer.absorb in (False, True):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf, angles(3, 0, 9), mask)
        y.backward(upstream)
        results.append([y, leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    for expanded, absorbed in zip(*results, strict=True):
        torch.testing.assert_close(expanded, absorbed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("absorb", [False, True, None], ids=["expanded", "absorbed", "by cost"])
@pytest.mark.parametrize("chunks", [[1] * 10, [4, 1, 3, 2], [7, 3]])
def test_chunks_with_a_cache_equal_the_full_forward(absorb, chunks):
    layer = build(12)
    x = torch.randn(2, 10, HIDDEN)
    full = layer(x, angles(2, 0, 10))
    layer.absorb, past, pieces, start = absorb, Past(), [], 0
    for size in chunks:
        stop = start + size
        mask = torch.arange(stop) <= torch.arange(start, stop)[:, None]
        mask = mask.expand(2, 1, -1, -1)
        pieces.append(layer(x[:, start:stop], angles(2, start, stop), mask, past))
        start = stop
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=1e-5, rtol=1e-5)


def test_static_cache_slots_that_are_masked_do_not_matter():
    layer = build()
    x = torch.randn(1, 3, HIDDEN)
    full = layer(x, angles(1, 0, 3))

    def static(latent, rope_key):
        junk = [torch.full_like(new[:, :, :1], 7.0).expand(-1, -1, 5, -1) for new in (latent, rope_key)]
        return torch.cat((latent, junk[0]), dim=2), torch.cat((rope_key, junk[1]), dim=2)

    mask = torch.ones(3, 8, dtype=torch.bool).tril()[None, None]
    for layer.absorb in (False, True):
        torch.testing.assert_close(layer(x, angles(1, 0, 3), mask, static), full, atol=1e-6, rtol=1e-5)


def test_causal():
    layer = build()
    x = torch.randn(1, 8, HIDDEN)
    changed = x.clone()
    changed[:, 5:] += 1.0
    before, after = layer(x, angles(1, 0, 8)), layer(changed, angles(1, 0, 8))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_mode_follows_the_cost_and_needs_a_cache():
    layer = build(kv_lora_rank=16)  # absorb iff T * (32 - 22) < 16 * 22, so up to 35 tokens
    for tokens, cache, absorbs in ((1, True, True), (35, True, True), (36, True, False), (1, False, False)):
        assert layer.absorbs(tokens, Past() if cache else None) == absorbs, (tokens, cache)
    layer.kv_b_proj.register_forward_hook(lambda *_: None)  # which wants to be called
    assert not layer.absorbs(1, Past())


@pytest.mark.parametrize("absorb", [False, True])
def test_a_query_that_may_look_nowhere_gets_zero(absorb):
    layer = build()
    layer.absorb = absorb
    x = torch.randn(2, 4, HIDDEN, requires_grad=True)
    mask = torch.ones(4, 4, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, 0], mask[1, ..., 0] = False, False
    y = layer(x, angles(2, 0, 4), mask)
    y.sum().backward()
    assert torch.equal(y[1, 0], torch.zeros(HIDDEN)) and x.grad.isfinite().all()


@pytest.mark.parametrize("absorb", [False, True])
def test_bfloat16_autocast_with_a_float32_cache(absorb):
    layer = build(12)
    layer.absorb = absorb
    x = torch.randn(2, 6, HIDDEN)
    full = layer(x, angles(2, 0, 6))

    def cache(latent, rope_key):
        return latent.float(), rope_key.float()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, angles(2, 0, 6), None, cache)
        y.float().sum().backward()
    torch.testing.assert_close(y.float(), full, atol=3e-2, rtol=3e-2)
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_default_softmax_scale():
    assert build().softmax_scale == 20**-0.5


@pytest.mark.parametrize("absorb", [True, False])
def test_a_single_token_without_a_mask_sees_all_of_the_past(absorb):
    torch.manual_seed(0)
    layer, x = build(), torch.randn(2, 4, HIDDEN)
    layer.absorb = absorb
    full = layer(x, angles(2, 0, 4))
    past = Past()
    layer(x[:, :3], angles(2, 0, 3), cache=past)
    torch.testing.assert_close(layer(x[:, 3:], angles(2, 3, 4), cache=past), full[:, 3:], atol=1e-6, rtol=0)


def test_several_tokens_with_a_past_need_a_mask():
    layer, past = build(), Past()
    layer(torch.randn(1, 3, HIDDEN), angles(1, 0, 3), cache=past)
    with pytest.raises(ValueError, match="mask=None with 5 keys for 2 queries: give the mask"):
        layer(torch.randn(1, 2, HIDDEN), angles(1, 3, 5), cache=past)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 0}, "num_heads=0: give a positive"),
        ({"qk_rope_head_dim": 5}, "qk_rope_head_dim=5: give an even"),
        ({"q_lora_rank": 0}, "q_lora_rank=0: give a positive number, or None"),
    ],
)
def test_bad_arguments(change, message):
    sizes = {
        "hidden_size": 32,
        "num_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    with pytest.raises(ValueError, match=message):
        MLA(**sizes | change)


def test_a_step_of_a_broadcast_position_and_of_what_is_not_finite():
    layer, x = build().eval(), torch.randn(2, 1, HIDDEN)
    cached = torch.randn(2, 1, 5, 16), torch.randn(2, 1, 5, ROPE)

    def cache(latent, rope_key):
        return torch.cat([cached[0], latent], dim=2), torch.cat([cached[1], rope_key], dim=2)

    with torch.no_grad():
        y = layer(x, angles(2, 5, 6), None, cache)
        assert torch.equal(layer(x, angles(1, 5, 6), None, cache), y)
        cached[0][1, 0, 2, 3] = float("nan")
        y = layer(x, angles(2, 5, 6), None, cache)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_a_cache_in_another_precision():
    layer, x = build().eval(), torch.randn(2, 1, HIDDEN)

    def cache(latent, rope_key):
        return latent.double(), rope_key.double()

    with torch.no_grad():
        y = layer(x, angles(2, 0, 1), None, cache)
    torch.testing.assert_close(y, layer(x, angles(2, 0, 1)), atol=1e-6, rtol=0)
