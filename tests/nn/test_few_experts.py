"""The experts of a step of decoding, compiled, and what they stand for."""

import pytest
import torch

from byrote.compiled import plain_twins
from byrote.nn.moe import Experts


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
