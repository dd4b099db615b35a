"""The compiled loops between the projections of a step of decoding, and their plain twins."""

import pytest
import torch

from byrote.nn import gqa
from byrote.nn.boundary import BoundaryHead
from byrote.nn.concept_attention import NOWHERE, ConceptAttention, Places
from byrote.nn.gqa import FEW, GroupedQueryAttention, attend_few, attend_few_compiled, split_heads
from byrote.nn.rope import rotary
from byrote.ops.dispatch import plain_twins

DIM = 8


def both(make):
    """What the loops and what the twins give, without gradients."""
    with torch.no_grad():
        fast = make()
        with plain_twins():
            return fast, make()


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 3, FEW])
@pytest.mark.parametrize("hidden", [0.0, 0.4])
def test_grouped_query_attention(heads, tokens, hidden):
    """A cache whose keys lie apart, as a part of larger buffers; some queries see nothing."""
    torch.manual_seed(0)
    layer, past = GroupedQueryAttention(12, *heads, DIM).eval(), 5
    slots = past + tokens
    held = torch.randn(2, 3, heads[1], slots + 4, DIM)
    mask = torch.rand(3, 1, tokens, slots) >= hidden
    mask[1, 0, 0] = False
    x, turns = torch.randn(3, tokens, 12), rotary(torch.arange(past, slots).expand(3, -1), DIM)

    def cache(key, value):
        buffers = held.clone()
        buffers[:, :, :, past:slots] = torch.stack([key, value])
        return buffers[0, :, :, :slots], buffers[1, :, :, :slots]

    def make(given=mask):
        return layer(x, turns, given, cache)

    fast, plain = both(make)
    torch.testing.assert_close(fast, plain, atol=2e-6, rtol=0)
    assert not fast[1, 0].any() and make().requires_grad
    if tokens == 1:
        torch.testing.assert_close(*both(lambda: make(None)), atol=2e-6, rtol=0)


def test_keys_in_any_order_of_memory():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 4 * DIM), torch.randn(2, 7, 2, DIM).transpose(1, 2)
    for value in (torch.randn(2, 2, 7, DIM), torch.randn(2, 2, DIM, 7).mT, key + 1):
        with torch.no_grad():
            fast = attend_few_compiled(query, key, value, None)
        plain = attend_few(split_heads(query, DIM), key, value, None)
        torch.testing.assert_close(fast, plain.transpose(1, 2).flatten(2), atol=2e-6, rtol=0)


def test_what_no_loop_is_for():
    query, key = torch.randn(1, 1, DIM), torch.randn(1, 1, 3, DIM)
    with torch.no_grad():
        assert attend_few_compiled(query, key, key, torch.zeros(1, 1, 1, 3)) is None
        assert attend_few_compiled(query, key.bfloat16(), key.bfloat16(), None) is None
        many = key[:, :, :1].expand(1, 1, gqa.FEW_NUMBERS, DIM)
        assert attend_few_compiled(query, many, many, None) is None
    assert attend_few_compiled(query.requires_grad_(), key, key, None) is None


def test_far_scores_and_what_is_not_a_number():
    """A softmax of scores a thousand apart; one row's NaN stays in its row."""
    query = torch.full((2, 1, DIM), 100.0)
    key = torch.linspace(-9, 9, 5)[:, None].expand(2, 1, 5, DIM).clone()
    value = torch.randn(2, 1, 5, DIM)
    key[1, 0, 2, 0] = float("nan")
    with torch.no_grad():
        out = attend_few_compiled(query, key, value, None)
    torch.testing.assert_close(out[0, 0], value[0, 0, -1])
    assert out[1].isnan().all()


@pytest.mark.parametrize("scan", [0, 5])
@pytest.mark.parametrize("with_tail", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
def test_boundaries(scan, with_tail, tokens):
    torch.manual_seed(0)
    head = BoundaryHead(12, scan).eval()
    h, tail = torch.randn(3, tokens, 12), torch.randn(3, 1, scan or 12) if with_tail else None
    alive, starts = torch.rand(3, tokens) < 0.8, torch.rand(3, tokens) < 0.2
    starts &= alive
    h[0, -1] = 0
    fast, plain = both(lambda: head(h, starts, alive, tail))
    torch.testing.assert_close(fast[0], plain[0], atol=1e-6, rtol=0)
    assert torch.equal(fast[1], plain[1])
    assert (fast[0][starts] == 1).all() and not fast[0][~alive].any()
    h[1] = float("nan")
    fast, plain = both(lambda: head(h, starts, alive, tail))
    assert torch.equal(fast[0].isnan(), plain[0].isnan()) and (fast[0].isnan().any() or tokens == 1)


@pytest.mark.parametrize("weighting", ["replicated", "uniform"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_reading_concepts(weighting, tokens):
    """Two documents in a row, padding behind a row's concepts, a token that sees nothing."""
    torch.manual_seed(0)
    layer = ConceptAttention(12, 10, 4, 2, DIM, weighting=weighting, eps=1e-6).eval()
    torch.nn.init.normal_(layer.q_norm.weight)
    key, value = (torch.randn(3, 2, 16, DIM)[:, :, :7] for _ in "kv")
    documents = torch.tensor([[0] * 7, [0, 0, 0, 9, 9, 9, NOWHERE], [0, 0] + [NOWHERE] * 5])
    positions = torch.tensor([[0, 1, 4, 5, 9, 20, 21], [0, 3, 7, 0, 2, 4, NOWHERE], [0, 6] + [NOWHERE] * 5])
    at = torch.arange(tokens)
    places = Places(
        torch.tensor([[0], [9], [0]]).expand(-1, tokens), torch.stack([at + 8, at, at + 5]), documents, positions
    )
    h = torch.randn(3, tokens, 12)
    torch.testing.assert_close(*both(lambda: layer(h, key, value, places)), atol=2e-6, rtol=0)
    lost = Places(torch.full((3, tokens), 30), places.token_position, documents, positions)
    with torch.no_grad():
        assert not layer(h, key, value, lost).any()
