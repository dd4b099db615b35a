"""Experts of a step of decoding, compiled, and what they stand for."""

import pytest
import torch
from torch import nn

from byrote.nn.moe import DeepSeekMoE, Experts
from byrote.ops.dispatch import plain_twins


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_experts_of_few_tokens(tokens):
    torch.manual_seed(0)
    experts = Experts(24, 16, 32).eval()
    x, gates = torch.randn(tokens, 24), torch.rand(tokens, 4)
    ids = torch.stack([torch.randperm(32)[:4] for _ in range(tokens)])
    assert experts._few(x, ids)
    torch.testing.assert_close(experts(x, ids, gates), experts.loop(x, ids, gates), atol=1e-6, rtol=0)
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


SETTINGS = [
    {},
    {"shared_width": 24},
    {"shared_width": 8, "renormalize": False, "route_scale": 2.5},
    {"scores": "softmax"},
    {"n_group": 4, "topk_group": 2},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (1, 7), (2, 30)])
def test_a_whole_layer(settings, tokens):
    torch.manual_seed(0)
    layer = DeepSeekMoE(24, 16, 32, 4, **settings).eval()
    layer.router.selection_bias.normal_()
    x = torch.randn(*tokens, 24)
    with torch.no_grad():
        fast, stats = layer(x)
        with plain_twins():
            plain, _ = layer(x)
    torch.testing.assert_close(fast, plain, atol=2e-6, rtol=0)
    assert stats == (None, None)


def test_layers_are_called_where_somebody_waits_for_it():
    """Hooks see their module, and what stands in its place is used, whatever the loops could do without."""
    torch.manual_seed(0)
    layer, x = DeepSeekMoE(24, 16, 32, 4, shared_width=24).eval(), torch.randn(1, 1, 24)
    (plain, _), seen = layer(x), []
    for name in ("router", "experts", "shared", "shared.gate_proj", "shared.down_proj"):
        handle = layer.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[0], plain, atol=2e-6, rtol=0)
        handle.remove()
        assert seen.pop()

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(24, 24, bias=False)
    doubled.weight = layer.shared.down_proj.weight
    layer.shared.down_proj = doubled
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0] - plain, layer.shared(x) / 2, atol=2e-6, rtol=0)


def test_bad_widths_are_refused():
    layer = DeepSeekMoE(24, 16, 32, 4, shared_width=24).eval()
    with torch.no_grad():
        for module, x in ((layer, torch.randn(1, 1, 23)), (layer.shared, torch.randn(1, 25))):
            with pytest.raises(RuntimeError, match="cannot be multiplied"):
                module(x)


def test_what_is_not_finite_stays_in_its_token():
    layer, x = DeepSeekMoE(24, 16, 32, 4, shared_width=24).eval(), torch.randn(2, 1, 24)
    x[1, 0, 3] = float("nan")
    with torch.no_grad():
        y, _ = layer(x)
    assert y[0].isfinite().all() and y[1].isnan().all()
