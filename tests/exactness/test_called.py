"""Every layer is called: what wraps, patches or hooks one is in cached decoding as in the full forward.

One layer of each kind in turn, in every model. A compiled loop or absorbed attention that read its weights instead
would give the logits of the model without it.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn.utils import parametrize

from tests.exactness.conftest import build
from tests.exactness.dlcm.conftest import DEEPSEEK
from tests.exactness.dlcm.conftest import build as build_dlcm

MODELS = {
    "engram": lambda: build(),
    "four streams": lambda: build(num_streams=4, modules=1),
    "dlcm": lambda: build_dlcm(**DEEPSEEK, boundary_threshold=0.6),
    "dlcm without memory": lambda: build_dlcm(boundary_convention="open"),
}
TOKENS = 4


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 20, (2, TOKENS), generator=torch.Generator().manual_seed(7))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """One of each kind: its own class, that of its parent, and its name there. Not what is only looped over."""
    found = {}
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        used = not isinstance(module, nn.ModuleList | nn.ModuleDict) and "mtp" not in name and "memories" not in name
        if used and own not in ("", "model") and not own.isdigit():
            found.setdefault((type(module), type(model.get_submodule(parent)), own), name)
    return {name: model.get_submodule(name) for name in found.values()}


@torch.no_grad()
def both(model, ids):
    """Logits of one forward, and of one token a step."""
    full, cache, steps = model(input_ids=ids, use_cache=False).logits, None, []
    for token in ids.split(1, dim=1):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    return full, torch.cat(steps, dim=1)


def moved(output):
    """The first tensor of floats, with some of itself added, as much at every token."""
    if isinstance(output, torch.Tensor):
        return output * (1.4 if output.dim() == 2 else 1.2 + 0.5 * torch.arange(output.shape[-1]).cos())
    parts = list(output)
    place = next(i for i, part in enumerate(parts) if isinstance(part, torch.Tensor) and part.is_floating_point())
    parts[place] = moved(parts[place])
    return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)


class Added(nn.Module):
    """Has nothing of the layer's but its call."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return moved(self.layer(*args, **kwargs))


def wrapped(layer):
    return Added(layer)


def subclassed(layer):
    class Sub(type(layer)):
        def forward(self, *args, **kwargs):
            return moved(super().forward(*args, **kwargs))

    sub = copy.copy(layer)
    sub.__class__ = Sub
    return sub


def patched(layer):
    patch = copy.copy(layer)
    patch.forward = lambda *args, **kwargs: moved(layer(*args, **kwargs))
    return patch


def hooked(layer):
    hook = copy.copy(layer)
    hook._forward_hooks = type(layer._forward_hooks)()
    hook.register_forward_hook(lambda module, args, output: moved(output))
    return hook


def saved(layer):
    """As PEFT's modules_to_save keeps it: a copy, which has been trained."""
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    wrapper = ModulesToSaveWrapper(layer, "default")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapper.modules_to_save.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return wrapper


def adapted(layer):
    """LoRA with something in B."""
    if not isinstance(layer, nn.Linear | nn.Embedding):
        return None
    holder = nn.ModuleDict({"layer": layer})
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=8, target_modules=["layer"], init_lora_weights=False), holder)
    return holder["layer"].eval()


class Turned(nn.Module):
    def forward(self, weight):
        return weight.flip(0)


def parametrized(layer):
    """So is what torch's weight_norm and spectral_norm return."""
    if not isinstance(layer, nn.Linear):
        return None
    return parametrize.register_parametrization(copy.deepcopy(layer), "weight", Turned())


@contextmanager
def in_place_of(model, name, layer):
    parent, _, own = name.rpartition(".")
    before = model.get_submodule(name)
    frozen = {parameter: parameter.requires_grad for parameter in before.parameters()}
    setattr(model.get_submodule(parent), own, layer)
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), own, before)
        for parameter, trained in frozen.items():
            parameter.requires_grad_(trained)


CHANGES = [wrapped, subclassed, patched, hooked, saved, adapted, parametrized]


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("change", CHANGES)
def test_what_stands_in_a_layers_place_is_called(model, ids, change, every):
    """By default each layer in one or two of the ways."""
    plain, _ = both(model, ids)
    tried = 0
    for name, layer in list(layers(model).items())[CHANGES.index(change) % every :: every]:
        changed = change(layer)
        if changed is None:
            continue
        with in_place_of(model, name, changed):
            full, cached = both(model, ids)
        assert (full - plain).abs().max() > 1e-3, name
        torch.testing.assert_close(cached, full, atol=2e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        tried += 1
    assert tried
