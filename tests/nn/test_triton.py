"""GPU kernels = their plain twins: on a GPU, from pinned memory; without one, in Triton's interpreter."""

import pytest
import torch

from byrote.tables.codecs import CODECS

pytest.importorskip("triton")
from byrote.nn.triton_gate import gather_gate, gather_gate_twin
from byrote.tables.loops.triton import decode, decode_twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu


def records(rows, width, codec="fp32"):
    """Rows of all sizes, two of them zeros."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, width, generator=generator)
    values *= torch.exp2(torch.randint(-20, 20, (rows, 1), generator=generator).float())
    values[3], values[4] = 0.0, -0.0
    made = CODECS[codec].encode(values, generator)
    return made.pin_memory() if DEVICE == "cuda" else made


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ids_of(rows, *shape):
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)


def same_bits(one, other):
    return ((one.view(torch.int32) == other.view(torch.int32)) | (one.isnan() & other.isnan())).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("width", "count"), [(40, 300), (64, 64), (1, 5), (37, 70), (100, 1), (256, 30), (16, 0)])
def test_decode(width, count, codec):
    """Of records whose size is a multiple of 4 and of such as are read byte by byte."""
    table, ids = records(50, width, codec), ids_of(50, count)
    assert same_bits(*(read(table, ids, CODECS[codec], width) for read in (decode, decode_twin)))


def test_every_number_of_eight_bits():
    """Not-a-number and the smallest scales too."""
    number = torch.arange(256, dtype=torch.uint8)
    for scale in (1, 127, 254, 255):
        table = torch.cat([number[:, None].expand(256, 32), torch.full((256, 1), scale, dtype=torch.uint8)], 1)
        table = table.pin_memory() if DEVICE == "cuda" else table
        ids = torch.arange(256, device=DEVICE)
        assert same_bits(*(read(table, ids, CODECS["fp8"], 32) for read in (decode, decode_twin)))


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_row_out_of_range_is_not_read(codec):
    ids = torch.tensor([7, -1, 50, 2**40, 49], device=DEVICE)
    values = decode(records(50, 40, codec), ids, CODECS[codec], 40)
    assert values.isnan().all(1).tolist() == [False, True, True, True, False]
    assert same_bits(values, decode_twin(records(50, 40, codec), ids, CODECS[codec], 40))


@pytest.mark.parametrize("rule", ["sign", "copysign"])
@pytest.mark.parametrize("codec", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("count", "columns", "width", "streams", "hidden"), [(21, 4, 12, 2, 40), (16, 8, 16, 4, 64), (1, 1, 3, 1, 5)]
)
def test_gather_gate(count, columns, width, streams, hidden, codec, rule):
    values = torch.randn(50, width, generator=torch.Generator().manual_seed(0)).to(CODECS[codec].dtype)
    table, ids = values.pin_memory() if DEVICE == "cuda" else values, ids_of(50, count, columns)
    h, key = random(count, streams, hidden), random(streams * hidden, columns * width, seed=3)
    h[0] = 0.0  # a logit of zero, where the two rules differ
    gain = random(streams, hidden, seed=4)
    embeddings, gates = gather_gate(table, ids, h, key, gain, 1e-6, rule)
    expected = gather_gate_twin(table, ids, h, key, gain, 1e-6, rule)
    assert torch.equal(embeddings, expected[0])
    torch.testing.assert_close(gates, expected[1], atol=1e-5, rtol=1e-5)
    assert count == 1 or gates.std() > 0.01


def test_what_a_kernel_could_not_read_is_refused():
    table, ids, codec = records(50, 8), ids_of(50, 6), CODECS["fp32"]
    for bad in (table.view(torch.float32), table[:, :4], table.flatten()):
        with pytest.raises(ValueError, match=r"records must be uint8 \[R, 32\]"):
            decode(bad, ids, codec, 8)
    with pytest.raises(ValueError, match="ids must be"):
        decode(table, ids.int(), codec, 8)
    with pytest.raises(ValueError, match="pin the records"):
        decode(table, torch.zeros(3, dtype=torch.int64, device="meta"), codec, 8)
    key, gain, pairs, values = random(10, 16), random(2, 5), ids.view(3, 2), table.view(torch.float32)
    with pytest.raises(ValueError, match=r"streams must be \[3, 2, 5\]"):
        gather_gate(values, pairs, random(4, 2, 5), key, gain, 1e-6, "sign")
    with pytest.raises(ValueError, match="records must be float32 or bfloat16"):
        gather_gate(table, pairs, random(3, 2, 5), key, gain, 1e-6, "sign")
    wide = records(5, 600).view(torch.float32)
    with pytest.raises(ValueError, match="does not fit"):
        gather_gate(wide, pairs % 5, random(3, 2, 5), random(10, 1200), gain, 1e-6, "sign")
