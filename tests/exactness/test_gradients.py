"""A loss made from logits, without labels: the gradients of every parameter and row, in training and evaluation, with a
cache and without, of one token and of more.
"""

import pytest
import torch
from torch.nn import functional as F

from byrote.ops.dispatch import plain_twins
from tests.exactness.conftest import build
from tests.exactness.dlcm.conftest import DEEPSEEK
from tests.exactness.dlcm.conftest import build as build_dlcm

MODELS = {
    "engram": lambda: build(),
    "four streams": lambda: build(num_streams=4, modules=1),
    "dlcm": lambda: build_dlcm(**{**DEEPSEEK, "boundary_mode": "e2e"}),
    "dlcm without memory": lambda: build_dlcm(boundary_convention="open"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def tokens(count):
    return torch.randint(3, 20, (2, count), generator=torch.Generator().manual_seed(7))


def gradients(model, ids, chunks=None, **options):
    """Of a smooth loss of the logits of each chunk behind the ones before; what a chunk returned for a cache."""
    torch.manual_seed(3)  # a DLCM draws its boundaries in training
    model.zero_grad()
    cache, parts, options = None, [], dict(options)
    for part in ids.split(chunks or [ids.shape[1]], dim=1):
        output = model(input_ids=part, past_key_values=cache, **options)
        cache = output.past_key_values
        parts.append(output.logits)
    F.log_softmax(torch.cat(parts, dim=1), dim=-1)[..., ::3].sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    if model.memory_stack is not None:
        for layer, memory in model.memory_stack.items():
            found[f"rows {layer}"] = memory.lookup.pending.take()[1]
    return found, cache


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            error = (found[name] - gradient).abs().max() if gradient.numel() else 0
            assert error <= 1e-4 * gradient.abs().max().clamp_min(1), name


@pytest.mark.parametrize("count", [1, 2, 17])
@pytest.mark.parametrize("training", [True, False])
def test_a_loss_from_logits(model, training, count):
    model.train(training)
    with plain_twins():
        expected, _ = gradients(model, tokens(count), use_cache=False)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in expected.values()) > 10
    for options in ({}, {"use_cache": True}):
        found, cache = gradients(model, tokens(count), **options)
        assert (cache is None) == (training and not options)
        assert_same(found, expected)


def test_through_a_cache(model):
    model.eval()
    with plain_twins():
        expected, _ = gradients(model, tokens(12), use_cache=False)
    found, _ = gradients(model, tokens(12), chunks=[6, 1, 1, 4], use_cache=True)
    assert_same(found, expected)


def test_what_is_frozen_hides_nothing_that_learns(model):
    """One layer that learns among frozen ones, whose inputs have no gradient: it gets its own."""
    model.eval().requires_grad_(False)
    names = ("kv_a_proj", "memory.key", "up_proj")
    learning = [layer for name, layer in model.model.named_modules() if name.endswith(names) and "mtp" not in name]
    try:
        for layer in (learning[0], learning[-1]):
            layer.weight.requires_grad_(True)
            [gradient] = torch.autograd.grad(model(input_ids=tokens(1)).logits.square().sum(), [layer.weight])
            assert gradient.any()
            layer.weight.requires_grad_(False)
    finally:
        model.requires_grad_(True)


def test_without_gradients_the_config_decides(model):
    with torch.no_grad():
        assert model.train()(input_ids=tokens(3)).past_key_values is not None
        assert model.eval()(input_ids=tokens(3)).past_key_values is not None
        assert model(input_ids=tokens(3), use_cache=False).past_key_values is None
