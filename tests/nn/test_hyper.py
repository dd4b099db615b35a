"""Connections: Sinkhorn and its twin, the two conventions, the formulas, and the start."""

import pytest
import torch
from torch.nn import functional as F

from byrote.nn.hyper import GatedExit, HyperConnection, ManifoldConnection, MeanExit, Residual
from byrote.ops.sinkhorn import plain_sinkhorn, sinkhorn, sinkhorn_slow

D = 8


def paper(hidden_size, num_streams, sublayer=0):
    return ManifoldConnection(hidden_size, num_streams, sublayer, convention="paper")


CONNECTIONS = {"hc": HyperConnection, "mhc": ManifoldConnection, "mhc_paper": paper}


def randomize(connection, strength=1.0):
    with torch.no_grad():
        for parameter in connection.parameters():
            parameter.normal_(std=strength)
    return connection


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("iterations", [1, 20])
def test_sinkhorn_and_its_twin(n, eps, iterations):
    torch.manual_seed(0)
    logits = torch.randn(n, n, 3, dtype=torch.float64).mul(2).requires_grad_()
    upstream = torch.randn_like(logits)
    fast = sinkhorn(logits, iterations=iterations, eps=eps)
    twins = [sinkhorn_slow(logits[..., k], iterations=iterations, eps=eps) for k in range(3)]
    slow = torch.stack(twins, dim=-1)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    [ours] = torch.autograd.grad(fast, logits, upstream)
    [theirs] = torch.autograd.grad(slow, logits, upstream)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("strength", [1, 3, 8])
def test_sinkhorn_is_what_autograd_makes_of_the_plain_one(eps, strength):
    torch.manual_seed(0)
    logits = torch.randn(4, 4, 200).mul(strength).transpose(0, 1).requires_grad_()
    upstream = torch.randn_like(logits)
    ours, plain = sinkhorn(logits, eps=eps), plain_sinkhorn(logits, eps=eps)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
    [gradient], [expected] = (torch.autograd.grad(mix, logits, upstream) for mix in (ours, plain))
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("strength", "columns"), [(1, 2e-3), (3, 0.1), (30, 3)])
def test_rows_are_exact_and_columns_nearly(strength, columns):
    torch.manual_seed(0)
    mix = sinkhorn(strength * torch.randn(4, 4, 1000))
    assert mix.isfinite().all() and (mix >= 0).all()
    assert (mix.sum(dim=1) - 1).abs().max() < 1e-5
    assert (mix.sum(dim=0) - 1).abs().max() < columns


def test_the_conventions_differ_by_layout_and_eps():
    """In DeepSeek-V4's convention the logits of H are (in, out), in the paper's (out, in)."""
    torch.manual_seed(0)
    ours, theirs = randomize(ManifoldConnection(D, 4), 0.5), paper(D, 4)
    with torch.no_grad():
        for name in ("weight", "bias"):
            value, other = getattr(ours, name), getattr(theirs, name)
            other.copy_(value)
            other[8:] = value[8:].unflatten(0, (4, 4)).transpose(0, 1).flatten(0, 1)
        theirs.scale.copy_(ours.scale)
    streams, y = torch.randn(2, 3, 4, D), torch.randn(2, 3, D)
    (x, write), (other_x, other_write) = ours(streams), theirs(streams)
    torch.testing.assert_close(x, other_x, atol=2e-5, rtol=0)
    torch.testing.assert_close(write(y), other_write(y), atol=2e-4, rtol=0)
    theirs.bias.data.copy_(ours.bias)
    assert (theirs(streams)[1](y) - write(y)).abs().max() > 0.1
    with pytest.raises(ValueError, match="convention is 'v3'; it must be 'deepseek_v4' or 'paper'"):
        ManifoldConnection(D, 4, convention="v3")


def hc_by_hand(connection, streams, f):
    """One token, one stream at a time."""
    n = connection.num_streams
    pre_bias, post_bias, mix_bias = connection.bias.split([n, n, n * n])
    out = torch.zeros_like(streams)
    for token in torch.cartesian_prod(*(torch.arange(size) for size in streams.shape[:2])):
        state = streams[tuple(token)]
        moved = [torch.tanh(connection.weight @ F.rms_norm(state[k], (D,), None, 1e-6)) for k in range(n)]
        pre = [connection.scale[0] * moved[k][0] + pre_bias[k] for k in range(n)]
        y = f(sum(pre[k] * state[k] for k in range(n)))
        for i in range(n):
            post = connection.scale[1] * moved[i][1] + post_bias[i]
            mix = [connection.scale[2] * moved[k][2 + i] + mix_bias[i * n + k] for k in range(n)]
            out[tuple(token)][i] = sum(mix[k] * state[k] for k in range(n)) + post * y
    return out


def mhc_by_hand(connection, streams, f):
    n = connection.num_streams
    pre_bias, post_bias, mix_bias = connection.bias.split([n, n, n * n])
    out = torch.zeros_like(streams)
    for token in torch.cartesian_prod(*(torch.arange(size) for size in streams.shape[:2])):
        state = streams[tuple(token)]
        z = connection.weight @ F.rms_norm(state.flatten(), (n * D,), None, 1e-6)
        pre = torch.sigmoid(connection.scale[0] * z[:n] + pre_bias)
        post = 2 * torch.sigmoid(connection.scale[1] * z[n : 2 * n] + post_bias)
        mix = sinkhorn_slow((connection.scale[2] * z[2 * n :] + mix_bias).view(n, n))
        out[tuple(token)] = mix @ state + torch.outer(post, f(pre @ state))
    return out


@pytest.mark.parametrize(("make", "by_hand"), [(HyperConnection, hc_by_hand), (paper, mhc_by_hand)])
def test_the_formula(make, by_hand):
    torch.manual_seed(0)
    connection = randomize(make(D, 3), 0.7).double()
    streams = torch.randn(2, 2, 3, D, dtype=torch.float64, requires_grad=True)
    wrt = [streams, *connection.parameters()]
    x, write = connection(streams)
    fast, slow = write(x.sin()), by_hand(connection, streams, torch.sin)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=0)
    upstream = torch.randn_like(fast)
    gradients = zip(torch.autograd.grad(fast, wrt, upstream), torch.autograd.grad(slow, wrt, upstream), strict=True)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_the_plain_residual():
    streams, y = torch.randn(2, 3, 1, D), torch.randn(2, 3, D)
    x, write = Residual()(streams)
    assert torch.equal(x, streams[:, :, 0]) and torch.equal(write(y), streams + y[:, :, None])


@pytest.mark.parametrize("kind", CONNECTIONS)
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("sublayer", [0, 5])
def test_the_start(kind, n, sublayer):
    """Equal streams stay equal, as one plain residual would have them; of different streams one is read."""
    torch.manual_seed(0)
    connection = CONNECTIONS[kind](D, n, sublayer)
    state, y = torch.randn(2, 3, D), torch.randn(2, 3, D)
    x, write = connection(state.unsqueeze(2).expand(-1, -1, n, -1))
    torch.testing.assert_close(x, state, atol=2e-6, rtol=0)
    torch.testing.assert_close(write(y), (state + y).unsqueeze(2).expand(-1, -1, n, -1), atol=8e-6, rtol=0)
    streams = torch.randn(2, 3, n, D)
    torch.testing.assert_close(connection(streams)[0], streams[:, :, sublayer % n], atol=1e-2, rtol=0)
    torch.testing.assert_close(connection(streams)[1](0 * y), streams, atol=1e-2, rtol=0)


@pytest.mark.parametrize("n", [2, 4])
def test_the_exit_starts_as_the_mean(n):
    torch.manual_seed(0)
    streams = torch.randn(2, 3, n, D)
    torch.testing.assert_close(GatedExit(D, n)(streams), MeanExit()(streams), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", CONNECTIONS)
def test_half_precision(kind):
    """Coefficients are float32 under autocast too; the streams keep their dtype."""
    torch.manual_seed(0)
    connection = randomize(CONNECTIONS[kind](D, 4))
    streams, y = torch.randn(2, 3, 4, D), torch.randn(2, 3, D).bfloat16()
    x, write = connection(streams)
    exact = write(y.float())
    with torch.autocast("cpu", torch.bfloat16):
        cast_x, cast_write = connection(streams)
        assert torch.equal(cast_x, x) and torch.equal(cast_write(y), exact)
    half = streams.bfloat16()
    x, write = connection(half)
    exact_x, exact_write = connection(half.float())
    assert x.dtype == write(y).dtype == torch.bfloat16
    assert torch.equal(x, exact_x.bfloat16()) and torch.equal(write(y), exact_write(y.float()).bfloat16())
