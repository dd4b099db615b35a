import pytest
import torch

from byrote.nn.gqa import FEW, GroupedQueryAttention, attend, attend_few
from byrote.nn.rope import rotary, rotate
from tests.nn.test_mla import Past

HIDDEN, HEADS, GROUPS, DIM = 32, 6, 2, 8


def build(groups=GROUPS):
    torch.manual_seed(0)
    return GroupedQueryAttention(HIDDEN, HEADS, groups, DIM)


def angles(batch, start, stop):
    return rotary(torch.arange(start, stop).expand(batch, -1), DIM)


def one_by_one(layer, x, turns, mask):
    """Each head of each token by itself."""
    batch, tokens, _ = x.shape
    groups = layer.num_key_value_heads
    query = rotate(layer.q_proj(x).view(batch, tokens, HEADS, DIM).transpose(1, 2), turns)
    key = rotate(layer.k_proj(x).view(batch, tokens, groups, DIM).transpose(1, 2), turns)
    value = layer.v_proj(x).view(batch, tokens, groups, DIM).transpose(1, 2)
    rows = []
    for b in range(batch):
        for t in range(tokens):
            heads = []
            for head in range(HEADS):
                group = head // (HEADS // groups)
                seen = mask[b, 0, t].nonzero().squeeze(1)
                scores = torch.stack([query[b, head, t] @ key[b, group, s] for s in seen]) / DIM**0.5
                heads.append(sum(w * value[b, group, s] for w, s in zip(scores.softmax(0), seen, strict=True)))
            rows.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(rows).view(batch, tokens, -1)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_against_one_by_one(groups, masked):
    layer = build(groups)
    x, upstream = torch.randn(2, 5, HIDDEN), torch.randn(2, 5, HIDDEN)
    causal = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    mask = (causal & (torch.rand(2, 1, 5, 5) < 0.6)) | torch.eye(5, dtype=torch.bool)
    results = []
    for run in (lambda y: layer(y, angles(2, 0, 5), mask if masked else None), None):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = run(leaf) if run else one_by_one(layer, leaf, angles(2, 0, 5), mask if masked else causal)
        y.backward(upstream)
        results.append([y, leaf.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunks", [[1] * 10, [4, 1, 3, 2], [7, 3], [FEW + 1, 1, FEW]])
def test_chunks_with_a_cache_equal_the_full_forward(chunks):
    layer, tokens = build(), sum(chunks)
    x = torch.randn(2, tokens, HIDDEN)
    full = layer(x, angles(2, 0, tokens))
    past, pieces, start = Past(), [], 0
    for size in chunks:
        stop = start + size
        mask = (torch.arange(stop) <= torch.arange(start, stop)[:, None]).expand(2, 1, -1, -1)
        pieces.append(layer(x[:, start:stop], angles(2, start, stop), mask, past))
        start = stop
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masks", ["bool", "float", "none"])
def test_few_queries_equal_torchs_attention(masks):
    """Values and gradients; a query that a bool mask lets look nowhere gets 0."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, steps, DIM) for heads, steps in ((HEADS, 3), (GROUPS, 7), (GROUPS, 7))]
    mask = None
    if masks != "none":
        mask = torch.rand(2, 1, 3, 7) < 0.6
        mask[0, 0, 0], mask[1, 0, 2] = True, masks == "float"
    if masks == "float":
        mask = torch.randn(2, 1, 3, 7).masked_fill(~mask, float("-inf"))
    upstream = torch.randn(2, HEADS, 3, DIM)
    results = []
    for function in (attend_few, attend):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        if masks == "none" and function is attend:  # plain causal there, everything here
            y = function(*leaves, torch.ones(2, 1, 3, 7, dtype=torch.bool))
        else:
            y = function(*leaves, mask)
        y.backward(upstream)
        results.append([y, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    if masks == "bool":
        assert not results[0][0][1, :, 2].any()


def test_what_is_not_finite_stays_in_its_query():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, steps, DIM) for heads, steps in ((HEADS, 2), (GROUPS, 4), (GROUPS, 4)))
    query[0, :, 1, 2] = float("nan")
    for mask in (None, torch.ones(1, 1, 2, 4, dtype=torch.bool)):
        y = attend_few(query, key, value, mask)
        assert y[:, :, 0].isfinite().all() and y[:, :, 1].isnan().all()


def test_causal():
    layer = build()
    x = torch.randn(1, 8, HIDDEN)
    changed = x.clone()
    changed[:, 5:] += 1.0
    before, after = layer(x, angles(1, 0, 8)), layer(changed, angles(1, 0, 8))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_bfloat16_autocast_with_a_float32_cache():
    layer = build()
    x = torch.randn(2, 6, HIDDEN)
    full = layer(x, angles(2, 0, 6))
    mask = torch.ones(6, 6, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    for given in (mask, None):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x, angles(2, 0, 6), given, lambda key, value: (key.float(), value.float()))
            y.float().sum().backward()
        torch.testing.assert_close(y.float(), full, atol=3e-2, rtol=3e-2)
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_a_single_token_sees_all_without_a_mask():
    layer, past = build(2), Past()
    x = torch.randn(2, 6, HIDDEN)
    full = layer(x, angles(2, 0, 6))
    pieces = [layer(x[:, t : t + 1], angles(2, t, t + 1), None, past) for t in range(6)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=1e-5, rtol=1e-5)


def test_a_past_needs_a_mask():
    layer, past = build(), Past()
    layer(torch.randn(1, 3, HIDDEN), angles(1, 0, 3), cache=past)
    with pytest.raises(ValueError, match="mask=None with 5 keys for 2 queries: give the mask"):
        layer(torch.randn(1, 2, HIDDEN), angles(1, 3, 5), cache=past)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((32, 6, 4, 8), "num_heads=6, num_key_value_heads=4: give a number of key heads that divides"),
        ((32, 6, 0, 8), "num_key_value_heads=0"),
        ((32, 6, 2, 7), "head_dim=7: give an even number"),
        ((32, 6, 2, 0), "head_dim=0"),
    ],
)
def test_bad_arguments(sizes, message):
    with pytest.raises(ValueError, match=message):
        GroupedQueryAttention(*sizes)
