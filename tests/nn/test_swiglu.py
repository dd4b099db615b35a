"""SwiGLU's product, compiled and plain: the same values and gradients, also over several threads."""

import pytest
import torch

from byrote.ops.swiglu import plain_swiglu, swiglu
from tests.nn.test_mix import assert_same, numbers, threads  # noqa: F401


@pytest.mark.parametrize("shape", [(1, 8), (2, 3, 24), (300, 17)])
@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_twins(threads, shape, weighed, side_by_side):  # noqa: F811
    torch.manual_seed(0)
    *tokens, width = shape
    gates = [numbers(*tokens, 2 * width)] if side_by_side else [numbers(*shape), numbers(*shape)]
    weight = [numbers(*tokens)] if weighed else []

    def given(function):
        def called(*inputs):
            gate, up = (inputs[0], None) if side_by_side else inputs[:2]
            return (function(gate, up, inputs[-1] if weighed else None),)

        return called

    assert_same(given(swiglu), given(plain_swiglu), (*gates, *weight))


def test_by_its_definition():
    gate, up, weight = torch.tensor([[-2.0, 0.0, 3.0]]), torch.tensor([[1.0, 2.0, -1.0]]), torch.tensor([0.5])
    expected = [-2 / (1 + 2.718281828**2) * 0.5, 0.0, -3 / (1 + 2.718281828**-3) * 0.5]
    torch.testing.assert_close(swiglu(gate, up, weight), torch.tensor([expected]))
    assert torch.autograd.gradcheck(plain_swiglu, [x.double().requires_grad_() for x in (gate, up, weight)])


def test_only_some_have_a_gradient():
    torch.manual_seed(0)
    gate, up, weight = torch.randn(5, 4), torch.randn(5, 4).requires_grad_(), torch.randn(5)
    for inputs in ((gate, up, weight), (gate, up), (gate, up.detach(), weight.requires_grad_())):
        asked = [x for x in inputs if x.requires_grad]
        got = torch.autograd.grad(swiglu(*inputs).sin().sum(), asked)
        torch.testing.assert_close(got, torch.autograd.grad(plain_swiglu(*inputs).sin().sum(), asked))
    assert not swiglu(gate, up.detach()).requires_grad


def test_any_layout():
    torch.manual_seed(0)
    gate, up = torch.randn(4, 5).T.requires_grad_(), torch.randn(5, 8)[:, ::2].requires_grad_()
    got = torch.autograd.grad(swiglu(gate, up).T.sin().sum(), (gate, up))
    torch.testing.assert_close(got, torch.autograd.grad(plain_swiglu(gate, up).T.sin().sum(), (gate, up)))


def test_extremes():
    gate = torch.tensor([[-200.0, -89.0, -30.0, 0.0, 30.0, 89.0, 200.0, float("inf")]])
    compiled, plain = (f(gate, torch.ones_like(gate)) for f in (swiglu, plain_swiglu))
    torch.testing.assert_close(compiled, plain, atol=1e-30, rtol=1e-6)
    assert swiglu(torch.full((1, 4), float("nan")), torch.ones(1, 4)).isnan().all()


def test_no_tokens():
    gate = torch.empty(0, 8, requires_grad=True)
    y = swiglu(gate)
    y.sum().backward()
    assert y.shape == (0, 4) and gate.grad.shape == (0, 8)
