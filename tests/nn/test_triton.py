"""GPU kernels = their plain twins: on a GPU, from pinned memory; without one, in Triton's interpreter."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

from byrote.nn.triton_gate import gather_gate, gather_gate_twin  # noqa: E402
from byrote.tables.triton_gather import gather, gather_twin  # noqa: E402

pytestmark = pytest.mark.gpu


def records(rows, width, dtype):
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    return values.pin_memory() if DEVICE == "cuda" else values


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ids_of(rows, *shape):
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "count"), [(40, 300), (64, 64), (1, 5), (100, 1), (16, 0)])
def test_gather(width, count, dtype):
    table, ids = records(50, width, dtype), ids_of(50, count)
    assert torch.equal(gather(table, ids), gather_twin(table, ids))


@pytest.mark.parametrize("rule", ["sign", "copysign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "columns", "width", "streams", "hidden"), [(21, 4, 12, 2, 40), (16, 8, 16, 4, 64), (1, 1, 3, 1, 5)]
)
def test_gather_gate(count, columns, width, streams, hidden, dtype, rule):
    table, ids = records(50, width, dtype), ids_of(50, count, columns)
    h, key = random(count, streams, hidden), random(streams * hidden, columns * width, seed=3)
    h[0] = 0.0  # a logit of zero, where the two rules differ
    gain = random(streams, hidden, seed=4)
    embeddings, gates = gather_gate(table, ids, h, key, gain, 1e-6, rule)
    expected = gather_gate_twin(table, ids, h, key, gain, 1e-6, rule)
    assert torch.equal(embeddings, expected[0])
    torch.testing.assert_close(gates, expected[1], atol=1e-5, rtol=1e-5)
    assert count == 1 or gates.std() > 0.01


def test_what_a_kernel_could_not_read_is_refused():
    table, ids = records(50, 8, torch.float32), ids_of(50, 6)
    for bad in (table.double(), table[:, :4], table.flatten()):
        with pytest.raises(ValueError, match="records must be"):
            gather(bad, ids)
    with pytest.raises(ValueError, match="ids must be"):
        gather(table, ids.int())
    with pytest.raises(ValueError, match="pin the records"):
        gather(table, torch.zeros(3, dtype=torch.int64, device="meta"))
    key, gain, pairs = random(10, 16), random(2, 5), ids.view(3, 2)
    with pytest.raises(ValueError, match=r"streams must be \[3, 2, 5\]"):
        gather_gate(table, pairs, random(4, 2, 5), key, gain, 1e-6, "sign")
    with pytest.raises(ValueError, match="does not fit"):
        gather_gate(records(5, 600, torch.float32), pairs % 5, random(3, 2, 5), random(10, 1200), gain, 1e-6, "sign")
