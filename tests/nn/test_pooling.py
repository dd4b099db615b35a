"""Pooling and smoothing against loops over tokens and concepts, with gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.nn.pooling import CLAMP, Formed, pool, smooth, smooth_one_by_one

HIDDEN = 3


def loop(h, boundaries, alive, starts, convention, waiting=None):
    """Segment by segment, as a reader would: the concepts of each row, and what waits in the end."""
    concepts, rests = [], []
    for row in range(h.shape[0]):
        segment = [] if waiting is None or not waiting[1][row] else [(waiting[0][row], int(waiting[1][row]))]
        found, ended = [], False
        for t in range(h.shape[1]):
            if not alive[row, t]:
                continue
            state, boundary = (h[row, t], 1), bool(boundaries[row, t])
            if starts[row, t]:
                if convention == "literal" and ended:
                    found.append(mean(segment))
                segment, ended = [], False
                if convention == "open":
                    found.append(torch.zeros(HIDDEN, dtype=h.dtype))
                    segment = [state]
                    continue
            if convention == "close":
                segment.append(state)
                if boundary:
                    found.append(mean(segment))
                    segment = []
            else:
                if boundary:
                    if convention == "open" or ended:
                        found.append(mean(segment))
                    segment, ended = [], True
                segment.append(state)
        if convention == "literal" and ended:
            found.append(mean(segment))
        concepts += found
        rests.append(segment)
    return torch.stack(concepts) if concepts else h.new_zeros(0, HIDDEN), rests


def mean(segment):
    return sum(total for total, _ in segment) / sum(count for _, count in segment)


@st.composite
def batches(draw):
    rows, steps = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    seed = draw(st.integers(0, 10**6))
    rate, cuts = draw(st.sampled_from([0.0, 0.3, 0.9])), draw(st.sampled_from([0.0, 0.2]))
    generator = torch.Generator().manual_seed(seed)
    alive = torch.ones(rows, steps, dtype=torch.bool)
    for row in range(rows):
        left = draw(st.integers(0, steps))
        alive[row, :left] = False
        alive[row, steps - draw(st.integers(0, steps - left)) :] = False
    continues = draw(st.booleans())
    starts = torch.rand(rows, steps, generator=generator) < cuts
    if not continues:
        starts |= alive & (alive.cumsum(dim=1) == 1)
    starts &= alive
    boundaries = ((torch.rand(rows, steps, generator=generator) < rate) | starts) & alive
    h = torch.randn(rows, steps, HIDDEN, generator=generator, dtype=torch.float64)
    waiting = None
    if continues:
        waiting = (
            torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64),
            torch.randint(1, 5, (rows,), generator=generator),
        )
    return h, boundaries, alive, starts, waiting


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from(["close", "open", "literal"]))
def test_pooling_against_a_loop(batch, convention):
    """Packed documents, padding on either side, an open segment from before."""
    h, boundaries, alive, starts, waiting = batch
    if convention == "literal":  # it has no past
        if waiting is not None:
            starts = starts | (alive & (alive.cumsum(dim=1) == 1))
            boundaries = boundaries | starts
        waiting = None
    results = []
    for run in (
        lambda x: pool(x, Formed.of(boundaries), boundaries, alive, starts, convention, waiting),
        lambda x: loop(x, boundaries, alive, starts, convention, waiting)[0],
    ):
        leaf = h.clone().requires_grad_()
        pooled = run(leaf)
        assert pooled.shape == (int(boundaries.sum()), HIDDEN)
        weights = torch.arange(pooled.numel(), dtype=torch.float64).view_as(pooled).cos()
        if pooled.requires_grad:
            (pooled * weights).sum().backward()
        results.append((pooled.detach(), torch.zeros_like(h) if leaf.grad is None else leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_gradients_by_differences():
    torch.manual_seed(0)
    boundaries = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)
    alive = torch.ones_like(boundaries)
    starts = torch.zeros_like(alive)
    starts[:, 0] = starts[1, 1] = True
    h = torch.randn(2, 5, HIDDEN, dtype=torch.float64, requires_grad=True)
    for convention in ("close", "open", "literal"):
        assert torch.autograd.gradcheck(
            lambda x, c=convention: pool(x, Formed.of(boundaries), boundaries, alive, starts, c), h
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_in_float32(dtype):
    """A mean over a thousand states that bfloat16 could not add up."""
    h = torch.ones(1, 1025, HIDDEN, dtype=dtype)
    boundaries = torch.zeros(1, 1025, dtype=torch.bool)
    boundaries[0, 0] = boundaries[0, -1] = True
    starts = torch.arange(1025)[None] == 0
    pooled = pool(h, Formed.of(boundaries), boundaries, torch.ones_like(boundaries), starts, "close")
    assert pooled.dtype == dtype and torch.equal(pooled, torch.ones(2, HIDDEN, dtype=dtype))


def test_the_order_of_what_is_formed():
    boundaries = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], dtype=torch.bool)
    formed = Formed.of(boundaries)
    assert formed.row.tolist() == [0, 0, 0, 2, 2] and formed.step.tolist() == [0, 2, 3, 1, 3]
    assert formed.rank.tolist() == [0, 1, 2, 0, 1] and formed.counts.tolist() == [3, 0, 2]
    x = torch.arange(12).view(3, 4)
    assert formed.at(x).tolist() == [0, 2, 3, 9, 11]
    assert formed.pad(formed.at(x), -1).tolist() == [[0, 2, 3], [-1, -1, -1], [9, 11, -1]]
    some = formed.among(torch.tensor([0, 2]))
    assert some.row.tolist() == [0, 0, 0, 1, 1] and some.pad(formed.at(x), -1).tolist() == [[0, 2, 3], [9, 11, -1]]
    nothing = Formed.of(torch.zeros_like(boundaries))
    assert nothing.pad(nothing.at(x.float()[..., None])).shape == (3, 0, 1)


def test_one_token_a_row_each_of_which_forms_a_concept():
    """Nothing has to be found, and what is given is what would be."""
    x, boundaries = torch.arange(3)[:, None], torch.ones(3, 1, dtype=torch.bool)
    formed, found = Formed.of(boundaries), Formed.of(torch.ones(3, 2, dtype=torch.bool) & (torch.arange(2) == 0))
    assert formed.whole and not found.whole and not Formed.of(boundaries & (x > 0)).whole
    for name in ("row", "step", "rank", "counts"):
        assert torch.equal(getattr(formed, name), getattr(found, name))
    assert torch.equal(formed.at(x), found.at(x)) and torch.equal(formed.pad(formed.at(x)), found.pad(found.at(x)))
    assert torch.equal(formed.among(formed.row).row, found.among(found.row).row)


def random_concepts(rows, most, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, most, HIDDEN, generator=generator, dtype=dtype)
    p = torch.rand(rows, most, generator=generator, dtype=dtype)
    starts = torch.rand(rows, most, generator=generator) < 0.15
    last = torch.randn(rows, HIDDEN, generator=generator, dtype=dtype)
    return z, p, starts, last


@pytest.mark.parametrize("with_last", [False, True])
@pytest.mark.parametrize("most", [1, 2, 40])
@pytest.mark.parametrize("extreme", [False, True])
def test_smoothing_against_one_by_one(most, with_last, extreme):
    """Values, and gradients by concepts, by probabilities and by what came before."""
    z, p, starts, last = random_concepts(3, most, seed=most)
    if not with_last:
        starts[:, 0] = True
    if extreme:
        p = torch.where(p < 0.5, p * 3e-4, 1 - (1 - p) * 3e-4)  # on both sides of where it is clamped
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype)
    results = []
    for function in (smooth, smooth_one_by_one):
        leaves = [x.clone().requires_grad_() for x in (z, p, last)]
        y = function(leaves[0], leaves[1], starts, leaves[2] if with_last else None)
        y.backward(upstream)
        results.append([y.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("value", [0.0, 1e-4, 0.02, 0.5, 1.0])
def test_smoothing_of_long_rows(value):
    """Two thousand concepts, in float32: logarithms of products that underflow long before the end."""
    z, p, _, _ = random_concepts(1, 2000, seed=0, dtype=torch.float32)
    p = (p * 0.02 + value).clamp(0, 1)
    starts = torch.arange(2000)[None] % 1500 == 0
    results = []
    for function in (smooth, smooth_one_by_one):
        leaves = [x.clone().requires_grad_() for x in (z, p)]
        y = function(*leaves, starts)
        y.square().sum().backward()
        results.append([y.detach(), leaves[0].grad])
    for ours, theirs in zip(*results, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_document_starts_anew():
    z, p, starts, last = random_concepts(2, 9, seed=3)
    starts[:] = torch.arange(9) == 4
    y = smooth(z, p, starts, last)
    assert torch.equal(y[:, 4], z[:, 4])
    torch.testing.assert_close(y[:, 4:], smooth(z[:, 4:], p[:, 4:], starts[:, 4:]), atol=1e-12, rtol=0)
    other = smooth(z, p, starts, last + 1)
    assert torch.equal(other[:, 4:], y[:, 4:]) and (other[:, :4] != y[:, :4]).all()


def test_smoothing_in_parts():
    z, p, starts, last = random_concepts(2, 12, seed=4)
    whole = smooth(z, p, starts, last)
    first = smooth(z[:, :5], p[:, :5], starts[:, :5], last)
    second = smooth(z[:, 5:], p[:, 5:], starts[:, 5:], first[:, -1])
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=1e-12, rtol=0)


def test_smoothing_of_certain_boundaries_is_nearly_nothing():
    z, p, starts, _ = random_concepts(2, 9, seed=5)
    y = smooth(z, torch.ones_like(p), starts | (torch.arange(9) == 0))
    assert (y - z).abs().max() < 10 * CLAMP


def test_smoothing_under_autocast_keeps_its_dtype():
    z, p, starts, last = random_concepts(2, 9, seed=6, dtype=torch.float32)
    starts[:, 0] = True
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(smooth(z, p, starts, last), smooth(z, p, starts, last).float())
        y = smooth(z, p, starts)
    assert torch.equal(y, smooth(z, p, starts)) and y.dtype == torch.float32
