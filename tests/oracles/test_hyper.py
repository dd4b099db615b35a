"""Our manifold-constrained connection and gated exit against transformers' DeepseekV4 modules."""

import pytest
import torch
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

from byrote.nn.hyper import GatedExit, ManifoldConnection

D = 24


def config(streams):
    return DeepseekV4Config(hidden_size=D, hc_mult=streams, rms_norm_eps=1e-6)


def copy_random(ours, theirs, strength):
    """`strength`: scale of the logits; at 3 twenty iterations are far from the end."""
    with torch.no_grad():
        ours.weight.normal_(std=D**-0.5)
        ours.bias.normal_(std=strength)
        ours.scale.normal_(std=strength)
        for name, parameter in zip(("weight", "bias", "scale"), theirs, strict=True):
            parameter.copy_(getattr(ours, name))


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("strength", [0.3, 3.0])
def test_connection(streams, strength, assert_near):
    torch.manual_seed(0)
    theirs = DeepseekV4HyperConnection(config(streams))
    ours = ManifoldConnection(D, streams)
    copy_random(ours, (theirs.fn, theirs.base, theirs.scale), strength)
    x, upstream = torch.randn(2, 5, streams, D), torch.randn(2, 5, streams, D)
    mixer = torch.randn(D, D) * D**-0.5
    our_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()

    read, write = ours(our_x)
    our_y = write((read @ mixer).tanh())
    post, comb, collapsed = theirs(their_x)
    their_y = torch.einsum("btmn,btmd->btnd", comb, their_x) + post[..., None] * (collapsed @ mixer).tanh()[:, :, None]
    our_y.backward(upstream)
    their_y.backward(upstream)

    assert_near(read, collapsed, "read")
    assert_near(our_y, their_y, "write")
    assert_near(our_x.grad, their_x.grad, "streams")
    for name, parameter in (("weight", theirs.fn), ("bias", theirs.base), ("scale", theirs.scale)):
        assert_near(getattr(ours, name).grad, parameter.grad, name)


@pytest.mark.parametrize("streams", [2, 4])
def test_exit(streams, assert_near):
    torch.manual_seed(0)
    theirs, ours = DeepseekV4HyperHead(config(streams)), GatedExit(D, streams)
    copy_random(ours, (theirs.hc_fn, theirs.hc_base, theirs.hc_scale), 1.0)
    x, upstream = torch.randn(2, 5, streams, D), torch.randn(2, 5, D)
    our_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    our_y, their_y = ours(our_x), theirs(their_x)
    our_y.backward(upstream)
    their_y.backward(upstream)
    assert_near(our_y, their_y)
    assert_near(our_x.grad, their_x.grad, "streams")
    for name, parameter in (("weight", theirs.hc_fn), ("bias", theirs.hc_base), ("scale", theirs.hc_scale)):
        assert_near(getattr(ours, name).grad, parameter.grad, name)
