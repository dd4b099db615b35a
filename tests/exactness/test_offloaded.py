"""Layers whose weights are not there until they are called, or of another kind: offloaded, quantized."""

import pytest
import torch
from torch import nn

from byrote.ops.dispatch import plain_twins
from tests.exactness.conftest import build
from tests.exactness.dlcm.conftest import DEEPSEEK
from tests.exactness.dlcm.conftest import build as build_dlcm
from tests.exactness.test_called import both

MODELS = {"engram": lambda: build(num_streams=4), "dlcm": lambda: build_dlcm(**DEEPSEEK, boundary_threshold=0.6)}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def ids():
    return torch.randint(3, 20, (2, 4), generator=torch.Generator().manual_seed(7))


def test_offloaded_to_memory(model, ids):
    """As `device_map` does with what no device has room for: weights on meta but while a layer is called."""
    accelerate = pytest.importorskip("accelerate")
    expected, _ = both(model, ids)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    for found in both(model, ids):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantized(model, ids):
    """By torch, to int8: what a loop would read is no weight. With loops it is as without."""
    plain, _ = both(model, ids)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    assert type(model.lm_head) is not nn.Linear
    full, cached = both(model, ids)
    with plain_twins():
        expected = both(model, ids)
    assert torch.equal(full, expected[0])
    torch.testing.assert_close(cached, expected[1], atol=1e-4, rtol=0)
    assert 0 < (full - plain).abs().max() < 1
