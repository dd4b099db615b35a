"""The compiled loops of a step of decoding, and what they stand for."""

import pytest
import torch
from torch.nn import functional as F

from byrote.compiled import plain_twins
from byrote.nn.moe import Experts
from byrote.nn.norm import RMSNorm


@pytest.mark.parametrize("shape", [(1, 1, 128), (2, 3, 24), (300, 7), (2, 0, 8)])
def test_norm(shape):
    torch.manual_seed(0)
    norm, x = RMSNorm(shape[-1], eps=1e-6).eval(), torch.randn(shape)
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        fast = norm(x)
        apart = torch.stack([x, x], dim=-1)[..., 0]
        assert torch.equal(norm(apart), fast)
        with pytest.raises(RuntimeError, match="normalized_shape"):
            norm(torch.randn(2, shape[-1] - 1))
        with plain_twins():
            plain = norm(x)
    torch.testing.assert_close(fast, plain, atol=2e-6, rtol=0)
    torch.testing.assert_close(fast, F.rms_norm(x, shape[-1:], norm.weight, 1e-6), atol=2e-6, rtol=0)
    assert norm(x).requires_grad and torch.equal(norm(x), plain)  # with a gradient it is torch's
    with torch.no_grad():
        assert torch.equal(norm.train()(x), plain)  # and in training, where blocks are recomputed
    assert norm.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_experts_of_few_tokens(tokens):
    torch.manual_seed(0)
    experts = Experts(24, 16, 32).eval()
    x, gates = torch.randn(tokens, 24), torch.rand(tokens, 4)
    ids = torch.stack([torch.randperm(32)[:4] for _ in range(tokens)])
    assert experts._few(x, ids)
    with torch.no_grad():
        fast = experts(x, ids, gates)
        with plain_twins():
            torch.testing.assert_close(fast, experts(x, ids, gates), atol=1e-6, rtol=0)
    torch.testing.assert_close(fast, experts.loop(x, ids, gates), atol=1e-6, rtol=0)
    x.requires_grad_()
    [gradient] = torch.autograd.grad(experts(x, ids, gates).sin().sum(), x)
    [expected] = torch.autograd.grad(experts.loop(x, ids, gates).sin().sum(), x)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0)


def test_experts_keep_what_is_not_finite():
    experts = Experts(8, 8, 16).eval()
    x, ids = torch.randn(2, 8), torch.tensor([[1, 2], [1, 3]])
    x[1, 5] = float("nan")
    with torch.no_grad():
        y = experts(x, ids, torch.ones(2, 2))
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            experts(torch.randn(1, 7), ids[:1], torch.ones(1, 2))
    assert y[0].isfinite().all() and y[1].isnan().all()
