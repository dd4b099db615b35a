"""Boundaries: probabilities against a loop, sharpening, sampling, and the loss that holds their rate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.nn.boundary import BoundaryHead, parser_loss, sample, sharpen

HIDDEN = 12


def head(scan):
    torch.manual_seed(0)
    return BoundaryHead(HIDDEN, scan)


def loop(module, h, starts, alive, tail=None):
    p = torch.zeros(h.shape[:2], dtype=h.dtype)
    for row in range(h.shape[0]):
        before = None if tail is None else tail[row, 0]
        for t in range(h.shape[1]):
            query, key = (
                (h[row, t], h[row, t]) if not module.scan_size else (module.query(h[row, t]), module.key(h[row, t]))
            )
            if starts[row, t]:
                p[row, t] = 1
            elif alive[row, t]:
                p[row, t] = (1 - before @ key / (before.norm() * key.norm())) / 2
            before = query
    return p


@pytest.mark.parametrize("scan", [0, 5, HIDDEN, 20])
@pytest.mark.parametrize("with_tail", [False, True])
def test_against_a_loop(scan, with_tail):
    module = head(scan)
    h, upstream = torch.randn(3, 9, HIDDEN), torch.randn(3, 9)
    alive = torch.ones(3, 9, dtype=torch.bool)
    alive[1, :3], alive[2, 6:] = False, False
    starts = torch.zeros(3, 9, dtype=torch.bool)
    starts[0, 0], starts[1, 3], starts[2, 0], starts[2, 4] = True, True, True, True
    tail = None
    if with_tail:
        tail, starts[0, 0] = torch.randn(3, 1, scan or HIDDEN), False
    results = []
    for run in (lambda x: module(x, starts, alive, tail)[0], lambda x: loop(module, x, starts, alive, tail)):
        module.zero_grad()
        leaf = h.clone().requires_grad_()
        p = run(leaf)
        p.backward(upstream)
        results.append([p.detach(), leaf.grad, *(parameter.grad.clone() for parameter in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_query_is_what_the_next_call_needs():
    module = head(5)
    h = torch.randn(2, 9, HIDDEN)
    starts, alive = torch.arange(9).expand(2, -1) == 0, torch.ones(2, 9, dtype=torch.bool)
    p, _ = module(h, starts, alive)
    first, query = module(h[:, :4], starts[:, :4], alive[:, :4])
    second, _ = module(h[:, 4:], starts[:, 4:], alive[:, 4:], query[:, -1:])
    torch.testing.assert_close(torch.cat([first, second], dim=1), p, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scan", [5, HIDDEN, 20])
def test_the_start_is_the_distance_of_states(scan):
    """Orthonormal: with as many dimensions as the states or more, p is what the rule gives."""
    module, rule = head(scan), head(0)
    start = module.start()
    product = start.T @ start if scan >= HIDDEN else start @ start.T
    torch.testing.assert_close(product, torch.eye(len(product)), atol=1e-5, rtol=0)
    with torch.no_grad():
        module.query.weight.copy_(start)
        module.key.weight.copy_(start)
    h = torch.randn(2, 7, HIDDEN)
    starts, alive = torch.arange(7).expand(2, -1) == 0, torch.ones(2, 7, dtype=torch.bool)
    same = torch.allclose(module(h, starts, alive)[0], rule(h, starts, alive)[0], atol=1e-5)
    assert same == (scan >= HIDDEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_float32_at_least(dtype):
    module = head(5).to(dtype)
    h = torch.randn(2, 7, HIDDEN).to(dtype)
    starts, alive = torch.arange(7).expand(2, -1) == 0, torch.ones(2, 7, dtype=torch.bool)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    p, query = module(h, starts, alive)
    assert p.dtype == query.dtype == wide
    exact, _ = module.to(torch.float64)(h.double(), starts, alive)
    torch.testing.assert_close(p.double(), exact, atol=1e-6, rtol=0)  # nothing is lost but what h has lost
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = module.to(dtype)(h, starts, alive)
    assert torch.equal(again, p)


def test_bounds():
    """The same state all along, opposite ones, and none at all."""
    h = torch.ones(1, 6, HIDDEN)
    h[:, 2] *= -3
    h[:, 4] = 0
    p, _ = head(0)(h, torch.arange(6)[None] == 0, torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(p, torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.5, 0.5]]), atol=1e-6, rtol=0)
    assert (p >= 0).all() and (p <= 1).all() and p[0, 4] == 0.5


def test_sharpened_values():
    """ConceptMoE's formula at tau = 6, by hand."""
    p = torch.tensor([0.0, 0.30, 0.49, 0.50, 0.70, 1.0], dtype=torch.float64)
    wanted = [0, 1 - 0.7 ** (1 / 6), 1 - 0.51 ** (1 / 6), 0.5 ** (1 / 6), 0.7 ** (1 / 6), 1]
    torch.testing.assert_close(sharpen(p, 6.0), torch.tensor(wanted, dtype=torch.float64), atol=1e-12, rtol=0)
    assert [round(float(x), 3) for x in sharpen(p, 6.0)] == [0, 0.058, 0.106, 0.891, 0.942, 1]
    torch.testing.assert_close(sharpen(p, 1.0), p, atol=1e-12, rtol=0)


@given(st.floats(0, 1), st.floats(1, 20))
def test_sharpening_moves_away_from_one_half(p, tau):
    sharp = float(sharpen(torch.tensor(p, dtype=torch.float64), tau))
    assert 0 <= sharp <= 1
    assert sharp >= p - 1e-12 if p >= 0.5 else sharp <= p + 1e-12


def test_sampled_frequencies():
    p = torch.tensor([0.0, 0.2, 0.49, 0.5, 0.8, 1.0]).expand(20000, -1)
    rates = sample(p, 6.0, torch.Generator().manual_seed(0)).float().mean(dim=0)
    wanted = sharpen(p[0], 6.0)
    assert (rates - wanted).abs().max() < 4 * 0.5 / math.sqrt(20000)
    assert rates[0] == 0 and rates[-1] == 1
    assert torch.equal(
        sample(p, 6.0, torch.Generator().manual_seed(3)), sample(p, 6.0, torch.Generator().manual_seed(3))
    )


def written_out(p, b, alive, ratio):
    """Equation 10 over all tokens, F without a gradient."""
    g = p[alive].mean()
    f = b[alive].double().mean()
    return ratio / (ratio - 1) * ((ratio - 1) * f * g + (1 - f) * (1 - g)) - 1


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0, 8.0])
def test_values_of_the_loss(ratio):
    def loss(rate, mean):
        count = 1000
        b = torch.arange(count) < round(rate * count)
        p = torch.full((count,), mean, dtype=torch.float64)
        return float(parser_loss(p[None], b[None], torch.ones(1, count, dtype=torch.bool), ratio))

    assert loss(1, 1) == pytest.approx(ratio - 1)
    assert loss(0, 0) == pytest.approx(1 / (ratio - 1))
    assert loss(0, 1) == pytest.approx(-1)
    if (1000 / ratio).is_integer():
        for mean in (0, 1 / ratio, 0.3, 1):
            assert loss(1 / ratio, mean) == pytest.approx(0, abs=1e-12)


def tokens(seed, rows=6, steps=7):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(rows, steps, generator=generator, dtype=torch.float64)
    b = torch.rand(rows, steps, generator=generator) < 0.4
    alive = torch.rand(rows, steps, generator=generator) < 0.8
    return p, b & alive, alive


@pytest.mark.parametrize("ratio", [1.5, 4.0])
def test_value_and_gradient_are_the_formulas(ratio):
    p, b, alive = tokens(0)
    ours, theirs = p.clone().requires_grad_(), p.clone().requires_grad_()
    loss = parser_loss(ours, b, alive, ratio)
    expected = written_out(theirs, b, alive, ratio)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)
    assert not ours.grad[~alive].any() and ours.grad[alive].unique().numel() == 1  # the same push for every token


def test_what_is_marked_under_padding_does_not_count():
    p, b, alive = tokens(1)
    spoiled = torch.where(alive, p, 0.7), b | ~alive
    assert parser_loss(*spoiled, alive, 4.0) == parser_loss(p, b, alive, 4.0)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 5), min_size=6, max_size=6), st.integers(1, 4))
def test_splits_add_up(seed, owners, ranks):
    """Micro-batches of any rows, and ranks whose gradients are averaged: the loss and gradient of the whole."""
    p, b, alive = tokens(seed)
    whole = p.clone().requires_grad_()
    loss = parser_loss(whole, b, alive, 4.0)
    loss.backward()
    counts = torch.stack([b.sum(), alive.sum()]).double()
    parts = p.clone().requires_grad_()
    total = 0.0
    for part in range(6):
        rows = [row for row, owner in enumerate(owners) if owner == part]
        if rows:
            share = parser_loss(parts[rows], b[rows], alive[rows], 4.0, counts / ranks)
            total = total + share / ranks
    total.backward()
    torch.testing.assert_close(total, loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-12, rtol=0)


def test_nothing_alive_costs_nothing():
    p, b, alive = tokens(2)
    p.requires_grad_()
    loss = parser_loss(p, b, torch.zeros_like(alive), 4.0)
    loss.backward()
    assert loss == 0 and not p.grad.any()
