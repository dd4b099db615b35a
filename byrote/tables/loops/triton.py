"""Rows straight out of host memory by a kernel on the GPU (zero copy), beside its plain twin. Needs Triton.

    decode(records [R, B], ids [N], codec, width) -> [N, W] float32 on the device of the ids

Records are uint8 as `byrote.tables.codecs` lays them out, contiguous, in the memory of the ids' device or page-locked
in host memory: the GPU then reads each row over the bus itself, and no thread of the host waits for ids or copies rows.
What goes over the bus is the record, a byte a value for int8 and fp8. A row whose id is out of range reads as NaN.

Bytes of a packed record are read four at a time where its size allows it, so that a warp asks for 128 bytes at once.
It has run in Triton's interpreter, on a CPU, and was compiled for an H100; it has run on no GPU.
"""

# No `from __future__ import annotations` here: Triton reads the annotations.
import torch
import triton
import triton.language as tl
from torch import Tensor

from byrote.tables.codecs import Codec

BLOCK = 4096  # bytes of packed records, or values, of a program: enough loads on their way at once to fill a bus


@triton.jit
def _copy(records, ids, out, count, num_rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Values that are stored as such."""
    place, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = place < count
    row = tl.load(ids + place, mask=inside, other=0)
    known = (row >= 0) & (row < num_rows)
    mask = (column < width)[None, :]
    values = tl.load(
        records + row[:, None] * width + column[None, :], mask=mask & (inside & known)[:, None], other=float("nan")
    )
    tl.store(out + place[:, None] * width + column[None, :], values.to(tl.float32), mask=mask & inside[:, None])


@triton.jit
def _unpack(
    records, words, ids, out, count, num_rows, size, width,
    CODEC: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """`records` by bytes, and the same as `words` of UNIT bytes, of which UNITS are more than a record has."""
    BYTES: tl.constexpr = UNITS * UNIT
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = place < count
    row = tl.load(ids + place, mask=inside, other=0)
    known = inside & (row >= 0) & (row < num_rows)
    unit, piece = tl.arange(0, UNITS), tl.arange(0, UNIT)
    taken = known[:, None] & ((unit * UNIT) < size)[None, :]
    word = tl.load(words + row[:, None] * (size // UNIT) + unit[None, :], mask=taken, other=0).to(tl.int32)
    byte = tl.reshape((word[:, :, None] >> (8 * piece)[None, None, :]) & 255, [ROWS, BYTES])
    column, first = tl.arange(0, BYTES), records + row * size
    if CODEC == "fp8":
        number, exponent = byte & 127, (byte >> 3) & 15
        fraction = tl.where(exponent == 0, byte & 7, (byte & 7) + 8).to(tl.float32)
        power = ((tl.maximum(exponent, 1) + 117) << 23).to(tl.float32, bitcast=True)  # 2^(e - 10)
        values = tl.where(number == 127, float("nan"), fraction * power)
        values = tl.where(byte > 127, -values, values)
        block = known[:, None] & (column < width)[None, :]
        scale = tl.load(first[:, None] + width + (column // 32)[None, :], mask=block, other=0).to(tl.int32)
        factor = tl.where(scale == 0, 1 << 22, scale << 23).to(tl.float32, bitcast=True)  # 2^(s - 127)
        values = tl.where(scale == 255, float("nan"), values * factor)
    else:
        begin = size - 4
        scale = tl.zeros([ROWS], tl.int32)
        for at in tl.static_range(4):
            scale |= tl.load(first + begin + at, mask=known, other=0).to(tl.int32) << (8 * at)
        factor = scale.to(tl.float32, bitcast=True)[:, None]
        if CODEC == "int8":
            values = tl.where(byte > 127, byte - 256, byte).to(tl.float32) * factor
        else:
            half = tl.arange(0, 2)
            nibble = tl.reshape((byte[:, :, None] >> (4 * half)[None, None, :]) & 15, [ROWS, 2 * BYTES])
            values = tl.where(nibble > 7, nibble - 16, nibble).to(tl.float32) * factor
            column = tl.arange(0, 2 * BYTES)
    values = tl.where(known[:, None], values, float("nan"))
    mask = inside[:, None] & (column < width)[None, :]
    tl.store(out + place[:, None] * width + column[None, :], values, mask=mask)


def decode(records: Tensor, ids: Tensor, codec: Codec, width: int) -> Tensor:
    check_records(records, ids, codec.record_bytes(width))
    (num_rows, size), count = records.shape, ids.numel()
    out = torch.empty(count, width, dtype=torch.float32, device=ids.device)
    if not count:
        return out
    if codec.dtype.is_floating_point:
        wide = triton.next_power_of_2(width)
        rows = max(BLOCK // wide, 1)
        values = records.view(codec.dtype)
        _copy[(triton.cdiv(count, rows),)](values, ids, out, count, num_rows, width, ROWS=rows, WIDTH=wide)
        return out
    unit = 4 if size % 4 == 0 and records.data_ptr() % 4 == 0 else 1
    units = triton.next_power_of_2(triton.cdiv(size, unit))
    rows = max(BLOCK // (units * unit), 1)
    words = records.view(torch.int32) if unit == 4 else records
    _unpack[(triton.cdiv(count, rows),)](
        *(records, words, ids, out, count, num_rows, size, width), CODEC=codec.name, UNIT=unit, ROWS=rows, UNITS=units
    )
    return out


def decode_twin(records: Tensor, ids: Tensor, codec: Codec, width: int) -> Tensor:
    known = (ids >= 0) & (ids < len(records))
    values = codec.decode(records.index_select(0, ids.where(known, 0).to(records.device)), width)
    return values.to(ids.device).where(known[:, None], torch.nan)


def check_records(records: Tensor, ids: Tensor, size: int) -> None:
    """ValueError where a kernel on the ids' device could not read the records as it takes them to be."""
    if records.dtype != torch.uint8 or records.dim() != 2 or records.shape[1] != size or not records.is_contiguous():
        raise ValueError(
            f"records must be uint8 [R, {size}] and contiguous, got {records.dtype} {list(records.shape)}, "
            f"strides {records.stride()}"
        )
    if ids.dtype != torch.int64 or not ids.is_contiguous():
        raise ValueError(f"ids must be int64 and contiguous, got {ids.dtype}, strides {ids.stride()}")
    if records.device != ids.device and not records.is_pinned():
        raise ValueError(
            f"records are on {records.device} and the ids on {ids.device}: pin the records (placement='pinned'), "
            "or move them there"
        )
