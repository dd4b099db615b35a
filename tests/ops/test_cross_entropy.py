"""The cross-entropy without logits is the one with them: values and gradients."""

import pytest
import torch

from byrote.ops import cross_entropy as loss
from byrote.ops.cross_entropy import linear_cross_entropy, plain_linear_cross_entropy


def inputs(tokens=50, width=12, vocabulary=40, dtype=torch.float32):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[::7] = -100
    return hidden, weight, targets


@pytest.fixture(params=[40 * 8, 40 * 13, 2**20], autouse=True)
def chunk(request, monkeypatch):
    """Chunks of 8 and 13 tokens, which do not divide 50, and one of all."""
    monkeypatch.setitem(loss.CHUNK, "cpu", request.param)
    monkeypatch.setattr(loss, "FEWEST", 1)


@pytest.mark.parametrize("scale", [1.0, 1 / 77])
def test_twins(scale):
    hidden, weight, targets = inputs()
    got, expected = (scale * f(hidden, weight, targets) for f in (linear_cross_entropy, plain_linear_cross_entropy))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (got, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(scale * linear_cross_entropy(hidden, weight, targets), got, rtol=1e-6, atol=0)


def test_gradients_in_double_precision():
    hidden, weight, targets = inputs(6, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight))


def test_large_logits():
    hidden, weight, targets = inputs()
    got = linear_cross_entropy(100 * hidden, weight, targets)
    assert got.isfinite()
    torch.testing.assert_close(got, plain_linear_cross_entropy(100 * hidden, weight, targets), rtol=1e-6, atol=0)


def test_nothing_to_predict():
    hidden, weight, targets = inputs()
    got = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    gradients = torch.autograd.grad(got, (hidden, weight))
    assert got == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("through", ["autocast", "parameters"])
def test_bfloat16(through):
    hidden, weight, targets = inputs()
    expected = plain_linear_cross_entropy(hidden, weight, targets)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    if through == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got = linear_cross_entropy(hidden, weight, targets)
        gradients = torch.autograd.grad(got, (hidden, weight))
    else:
        got = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
        gradients = torch.autograd.grad(got, (hidden, weight))
    assert got.dtype == torch.float32 and {g.dtype for g in gradients} == {torch.float32}
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=0)
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()
