"""A connection as one node: the values and gradients of its plain twin, at every number of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.nn.hyper import ManifoldConnection
from byrote.ops.dispatch import plain_twins
from byrote.ops.streams import connectable


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def make(d, strength):
    connection = ManifoldConnection(d, 4)
    for parameter in connection.parameters():
        torch.nn.init.normal_(parameter, std=strength if parameter.dim() == 1 else 0.1)
    return connection


def step(connection, streams, y, weights):
    """x, what is written, and the gradients of all that they depend on."""
    x, write = connection(streams)
    outputs = x, write(y)
    return [*outputs, *torch.autograd.grad(outputs, [streams, y, *connection.parameters()], weights)]


def assert_same(connection, streams, y):
    weights = [torch.randn_like(y), torch.randn(*y.shape[:2], 4, y.shape[2])]
    fast = step(connection, streams, y, weights)
    with plain_twins():
        plain = step(connection, streams, y, weights)
    for ours, theirs in zip(fast, plain, strict=True):
        error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1)
        assert ours.shape == theirs.shape and error < 1e-5


@pytest.mark.parametrize("strength", [0.3, 1.0, 3.0])
@pytest.mark.parametrize(("d", "tokens"), [(16, 1), (48, 131), (128, 300)])
def test_the_twin(threads, d, tokens, strength):
    torch.manual_seed(0)
    streams, y = torch.randn(1, tokens, 4, d, requires_grad=True), torch.randn(1, tokens, d, requires_grad=True)
    assert connectable(streams.flatten(0, 1), 1e-6)
    assert_same(make(d, strength), streams, y)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from([16, 32]), st.integers(0, 2**31), st.booleans())
def test_any_number_of_tokens_in_any_layout(rows, tokens, d, seed, expanded):
    torch.manual_seed(seed)
    y = torch.randn(rows, d, tokens, requires_grad=True).transpose(1, 2)
    streams = torch.randn(rows, tokens, 4, d, requires_grad=True)
    assert_same(make(d, 1.0), y.unsqueeze(2).expand(-1, -1, 4, -1) if expanded else streams, y)


def test_at_the_start():
    torch.manual_seed(0)
    streams, y = torch.randn(2, 50, 4, 32, requires_grad=True), torch.randn(2, 50, 32, requires_grad=True)
    assert_same(ManifoldConnection(32, 4, 3), streams, y)


def test_what_is_not_used_has_no_gradient():
    """Only read; only written; written twice."""
    torch.manual_seed(0)
    streams, connection = torch.randn(1, 20, 4, 16, requires_grad=True), make(16, 1.0)

    def gradients(use):
        x, write = connection(streams)
        return torch.autograd.grad(use(x, write).square().sum(), [streams, *connection.parameters()])

    for use in (
        lambda x, write: x,
        lambda x, write: write(torch.ones(1, 20, 16)),
        lambda x, write: write(x) + 2 * write(x.sin()),
    ):
        ours = gradients(use)
        with plain_twins():
            theirs = gradients(use)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=0)


def test_gradients_that_arrived_are_left_alone():
    torch.manual_seed(0)
    streams, connection = torch.randn(1, 20, 4, 16, requires_grad=True), make(16, 1.0)
    x, write = connection(streams)
    written, weight = write(x), torch.randn(1, 20, 4, 16)
    before = weight.clone()
    torch.autograd.grad(written, streams, weight)
    assert torch.equal(weight, before)


def test_extreme_logits_and_what_is_not_finite():
    """A logit of 1e4 closes and opens; a NaN stays with its token."""
    torch.manual_seed(0)
    connection = make(16, 1.0)
    with torch.no_grad():
        connection.bias.mul_(1e4)
    streams, y = torch.randn(1, 40, 4, 16, requires_grad=True), torch.randn(1, 40, 16, requires_grad=True)
    assert_same(connection, streams, y)
    with torch.no_grad():
        streams[0, 17, 2, 3] = float("nan")
        x, write = connection(streams)
        for found in (x, write(y)):
            bad = found.flatten(2).isnan().any(dim=-1)[0]
            assert bad.tolist() == [t == 17 for t in range(40)]
