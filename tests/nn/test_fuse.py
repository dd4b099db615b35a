"""Passes of a memory, compiled and plain: the same values and gradients, also over several threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.ops.dispatch import plain_twins
from byrote.ops.memory import convolve, gate_logits, gated, plain_convolve
from tests.nn.test_mix import assert_same, numbers, threads  # noqa: F401


def both(function):
    def plain(*inputs):
        with plain_twins():
            return function(*inputs)

    return function, plain


@pytest.mark.parametrize(("n", "d", "tokens"), [(1, 8, 3), (2, 33, 1), (4, 128, 300), (1, 256, 131)])
def test_twins(threads, n, d, tokens):  # noqa: F811
    torch.manual_seed(0)
    streams, keys, gain, value = numbers(tokens, n, d), numbers(tokens, n, d), numbers(n, d), numbers(tokens, d)
    assert_same(*both(lambda *x: (gate_logits(*x, 1e-6),)), (streams, keys, gain))
    gates = torch.rand(tokens, n).requires_grad_()
    assert_same(*both(lambda *x: gated(*x, 1e-5)), (gates, value, gain))
    documents = (torch.rand(tokens) < 0.1).cumsum(0)
    taps = numbers(4, n, d)
    assert_same(*both(lambda *x: (convolve(*x, documents, 3),)), (streams, taps))


def convolved_slowly(columns, taps, documents, dilation):
    z = torch.zeros_like(columns)
    for now in range(len(columns)):
        for tap in range(len(taps)):
            place = now - (len(taps) - 1 - tap) * dilation
            if place >= 0 and documents[place] == documents[now]:
                z[now] += taps[tap] * columns[place]
    return z


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 4), st.integers(1, 12))
def test_convolution_by_its_definition(seed, kernel, dilation, tokens):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(tokens, 2, 3, generator=generator)
    taps = torch.randn(kernel, 2, 3, generator=generator)
    documents = (torch.rand(tokens, generator=generator) < 0.3).cumsum(0)
    expected = convolved_slowly(columns, taps, documents, dilation)
    for function in (convolve, plain_convolve):
        torch.testing.assert_close(function(columns, taps, documents, dilation), expected)


def test_derivatives_of_the_plain_twins():
    torch.manual_seed(0)
    d64 = {"dtype": torch.float64}
    x, y, gain = numbers(5, 2, 4, **d64), numbers(5, 2, 4, **d64), numbers(2, 4, **d64)
    assert torch.autograd.gradcheck(lambda *i: gate_logits(*i, 1e-6), (x, y, gain))
    assert torch.autograd.gradcheck(lambda *i: gated(*i, 1e-5), (numbers(5, 2, **d64), numbers(5, 4, **d64), gain))
    documents = torch.tensor([0, 0, 1, 1, 1])
    assert torch.autograd.gradcheck(lambda *i: convolve(*i, documents, 1), (x, numbers(3, 2, 4, **d64)))


def test_one_output_alone_has_a_gradient():
    torch.manual_seed(0)
    inputs = torch.rand(7, 2).requires_grad_(), numbers(7, 5), numbers(2, 5)
    for output in (0, 1):
        assert_same(*both(lambda *x, output=output: (gated(*x, 1e-5)[output] * 1.0 + 0 * x[2].sum(),)), inputs)


def test_what_is_not_finite_stays_in_its_document():
    columns, taps = torch.randn(6, 1, 4), torch.randn(2, 1, 4)
    columns[1, 0, 2] = float("nan")
    z = convolve(columns, taps, torch.tensor([0, 0, 0, 1, 1, 1]), 1)
    assert z[1:3, 0, 2].isnan().all() and z[3:].isfinite().all()
    assert convolve(columns, taps, torch.tensor([0, 0, 1, 1, 1, 1]), 1)[2:].isfinite().all()


def test_logits_are_exact_where_terms_cancel():
    """s is small beside its terms: float64 within, so that only the inputs' rounding is left."""
    torch.manual_seed(0)
    streams, keys = torch.randn(50, 1, 64), torch.randn(50, 1, 64)
    gain = torch.ones(1, 64)
    keys = keys - streams * (keys * streams).sum(-1, keepdim=True) / streams.square().sum(-1, keepdim=True)
    exact = gate_logits(streams.double(), keys.double(), gain.double(), 1e-6)
    assert exact.abs().max() < 1e-6
    torch.testing.assert_close(gate_logits(streams, keys, gain, 1e-6).double(), exact, rtol=1e-5, atol=1e-13)
