"""Passes over the streams, compiled and plain: the same values and gradients, also over several threads."""

import pytest
import torch

from byrote.ops.streams import plain_project, plain_read, plain_write, project, read, write


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def assert_same(fast, plain, inputs):
    """Outputs of both, and the gradients of random weighted sums of them."""
    results, weights = [], None
    for function in (fast, plain):
        outputs = function(*inputs)
        if weights is None:
            weights = [torch.randn_like(output) for output in outputs]
        gradients = torch.autograd.grad(outputs, inputs, [weight.clone() for weight in weights])
        results.append([*outputs, *gradients])
    for ours, theirs in zip(*results, strict=True):
        error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)
        assert ours.shape == theirs.shape and error < 1e-5


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


# Compiled for four streams of a multiple of 16, else plain.
SHAPES = [(4, 128, 300), (4, 16, 1), (4, 48, 131), (4, 40, 131), (1, 8, 3), (2, 33, 1), (5, 16, 7)]


@pytest.mark.parametrize(("n", "d", "tokens"), SHAPES)
def test_twins(threads, n, d, tokens):
    torch.manual_seed(0)
    streams, weight = numbers(tokens, n, d), numbers(n * (n + 2), n * d)
    pre, post, mix, y = numbers(tokens, n), numbers(tokens, n), numbers(tokens, n, n), numbers(tokens, d)
    assert_same(lambda x, w: project(x, w, 1e-6), lambda x, w: (plain_project(x, w, 1e-6), x), (streams, weight))
    assert_same(read, lambda x, p: (plain_read(x, p), x), (streams, pre))
    assert_same(lambda *inputs: (write(*inputs),), lambda *inputs: (plain_write(*inputs),), (streams, y, mix, post))


def test_inputs_in_any_layout():
    """Expanded streams (a first connection's), transposed coefficients."""
    torch.manual_seed(0)
    x, pre, mix, y = numbers(90, 16), numbers(4, 90), numbers(4, 4, 90), numbers(90, 16)

    def both(read, write):
        def function(x, pre, mix, y):
            streams = x.unsqueeze(1).expand(-1, 4, -1)
            got = read(streams, pre.T)
            return (got[0] if isinstance(got, tuple) else got), write(streams, y, mix.permute(2, 0, 1), pre.T)

        return function

    assert_same(both(read, write), both(plain_read, plain_write), (x, pre, mix, y))


def test_other_dtypes_take_the_plain_way():
    torch.manual_seed(0)
    d64 = {"dtype": torch.float64}
    streams, pre, mix, y = numbers(3, 2, 4, **d64), numbers(3, 2, **d64), numbers(3, 2, 2, **d64), numbers(3, 4, **d64)
    assert torch.autograd.gradcheck(lambda x, p: read(x, p)[0], (streams, pre))
    assert torch.autograd.gradcheck(write, (streams, y, mix, pre))
    assert torch.autograd.gradcheck(lambda x, w: project(x, w, 1e-6)[0], (streams, numbers(8, 8, **d64)))


def test_there_is_no_second_derivative():
    streams, pre = numbers(3, 4, 16), numbers(3, 4)
    [gradient] = torch.autograd.grad(read(streams, pre)[0].square().sum(), [pre], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_nothing_that_is_not_finite_is_lost():
    streams, pre = torch.randn(4, 4, 16), torch.rand(4, 4)
    streams[1, 0, 3], streams[2, 1, 0] = float("nan"), float("inf")
    x, _ = read(streams, pre)
    assert x[1].isnan().tolist() == [c == 3 for c in range(16)] and x[2, 0].isinf()
    assert x[[0, 3]].isfinite().all()
