"""GPU kernels = their plain twins: on a GPU, from pinned memory; without one, in Triton's interpreter."""

import pytest
import torch

from byrote.tables.codecs import CODECS

pytest.importorskip("triton")
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


def test_what_a_kernel_could_not_read_is_refused():
    table, ids, codec = records(50, 8), ids_of(50, 6), CODECS["fp32"]
    for bad in (table.view(torch.float32), table[:, :4], table.flatten()):
        with pytest.raises(ValueError, match=r"records must be uint8 \[R, 32\]"):
            decode(bad, ids, codec, 8)
    with pytest.raises(ValueError, match="ids must be"):
        decode(table, ids.int(), codec, 8)
    with pytest.raises(ValueError, match="pin the records"):
        decode(table, torch.zeros(3, dtype=torch.int64, device="meta"), codec, 8)
