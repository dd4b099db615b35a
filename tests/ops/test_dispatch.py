"""When a loop may stand in for a layer: never for one that is not exactly what we made."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from byrote.nn.moe import MLP, DeepSeekMoE
from byrote.ops.dispatch import matrix, one_loop, plain_twins, weights


def linear(**options):
    return nn.Linear(8, 4, **{"bias": False, **options})


def subclassed(layer):
    layer.__class__ = type("Adapter", (nn.Linear,), {})


def patched(layer):
    layer.forward = lambda x: x


def scaled(layer):
    parametrize.register_parametrization(layer, "weight", nn.Identity())


CHANGES = {
    "subclass": subclassed,
    "patch": patched,
    "hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "hook before": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "parametrization": scaled,
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "weight norm of old": lambda layer: torch.nn.utils.spectral_norm(layer),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "bias": lambda layer: layer.register_parameter("bias", nn.Parameter(torch.zeros(4))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_linear_layer_that_is_more_than_its_matrix(change):
    layer = linear()
    assert matrix(layer) is layer.weight
    CHANGES[change](layer)
    assert matrix(layer) is None


def test_what_is_patched_or_hooked_everywhere(monkeypatch):
    layer = linear()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert matrix(layer) is None
    handle.remove()
    assert matrix(layer) is layer.weight
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert matrix(layer) is None


def test_other_layers_and_weights():
    assert matrix(nn.Identity()) is None and matrix(MLP(8, 8)) is None
    layer = linear()
    layer.weight = nn.Parameter(torch.randn(4, 8).as_subclass(type("Quantized", (torch.Tensor,), {})))
    assert matrix(layer) is None
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear()), {nn.Linear})
    assert matrix(quantized[0]) is None


def test_all_in_a_layer_counts():
    layer = DeepSeekMoE(8, 8, 16, 2, shared_width=8)
    assert len(weights(layer)) == 6
    patched(layer.shared.down_proj)
    assert weights(layer) is None


def counting(layer, x):
    layer.loops += 1
    return x


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.loops = nn.Parameter(torch.ones(8)), 0

    @one_loop(counting)
    def forward(self, x, other=None):
        return x * self.weight


Layer.__module__ = Layer.forward.__module__ = "byrote.nn.test"


def test_the_conditions_of_a_step():
    layer, x = Layer().eval(), torch.randn(2, 1, 8)

    def looped(*inputs, **named):
        layer.loops = 0
        layer(*inputs, **named)
        return bool(layer.loops)

    assert not looped(x)  # the weight learns
    with torch.no_grad():
        assert looped(x)
        assert not looped(torch.randn(2, 2, 8)) and not looped(torch.randn(1, 8)) and not looped(x.double())
        assert not looped(x, torch.ones(1).bfloat16()) and not looped(x, other=torch.ones(1).double())
        with plain_twins():
            assert not looped(x)
        with plain_twins("counting"):
            assert not looped(x)
        with plain_twins("another"):
            assert looped(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not looped(x)
        layer.train()
        assert not looped(x)
        layer.eval().double()
        assert not looped(x)
