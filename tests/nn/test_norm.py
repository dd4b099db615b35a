"""RMSNorm, compiled and plain: the same values and gradients, also over several threads."""

import pytest
import torch
from torch.nn import functional as F

from byrote.nn.norm import RMSNorm
from byrote.ops.dispatch import plain_twins
from tests.nn.test_mix import assert_same, numbers, threads  # noqa: F401


def norm_of(width):
    norm = RMSNorm(width, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 3, 24), (300, 7), (5,)])
def test_twins(threads, shape):  # noqa: F811
    torch.manual_seed(0)
    norm = norm_of(shape[-1])

    def compiled(x, weight):
        return (torch.func.functional_call(norm, {"weight": weight}, (x,)),)

    def plain(x, weight):
        return (F.rms_norm(x, shape[-1:], weight, 1e-6),)

    assert_same(compiled, plain, (numbers(*shape), norm.weight.detach().clone().requires_grad_()))
    with plain_twins():
        x = numbers(*shape)
        assert torch.equal(norm(x), plain(x, norm.weight)[0])


@pytest.mark.parametrize("training", [True, False])
def test_the_same_with_and_without_gradients(training):
    """A block that is recomputed runs without and with gradients, and must round alike."""
    norm, x = norm_of(24).train(training), numbers(2, 3, 24)
    with torch.no_grad():
        assert torch.equal(norm(x), norm(x.detach().requires_grad_()))
        once = norm(x)
    assert torch.equal(norm(x), once)


def test_only_one_of_the_two_has_a_gradient():
    norm, x = norm_of(8), torch.randn(4, 8)
    norm(x).sum().backward()
    assert norm.weight.grad is not None
    norm.weight.requires_grad_(False)
    assert not norm(x).requires_grad
    [gradient] = torch.autograd.grad(norm(x.requires_grad_()).sin().sum(), x)
    [expected] = torch.autograd.grad(F.rms_norm(x, (8,), norm.weight, 1e-6).sin().sum(), x)
    torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=0)


def test_input_of_any_layout_and_other_precisions():
    norm, x = norm_of(8), torch.randn(2, 3, 8)
    apart = torch.stack([x, x], dim=-1)[..., 0]
    assert not apart.is_contiguous() and torch.equal(norm(apart), norm(x))
    y = norm(apart.requires_grad_())
    y.transpose(0, 1).sin().sum().backward()  # a gradient of another layout
    assert norm.double()(x.double()).dtype == torch.float64
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_bad_width():
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm_of(8)(torch.randn(2, 7))


def test_what_is_not_finite_stays_in_its_token():
    x = torch.randn(3, 8)
    x[1, 2] = float("nan")
    y = norm_of(8)(x)
    assert y[1].isnan().all() and y[::2].isfinite().all()


def test_no_tokens():
    norm, x = norm_of(8), torch.empty(2, 0, 8, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape and not norm.weight.grad.any()
