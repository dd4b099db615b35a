"""Rows straight out of host memory by a kernel on the GPU (zero copy), beside its plain twin. Needs Triton.

    gather(records [R, W], ids [N]) -> [N, W] float32, where the ids are         out[i] = records[ids[i]]

Records are float32 or bfloat16, contiguous, in the memory of the ids' device or pinned in host memory: the device then
reads each row over the bus itself, and no thread of the host copies anything. The caller has checked that the ids are
in range. The packed codecs are left out.

It has run in Triton's interpreter, on a CPU, and was compiled for an H100; it has run on no GPU, and no table uses it.
"""

# No `from __future__ import annotations` here: Triton reads the annotations.
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # values of a program: enough loads on their way at once to fill a bus


@triton.jit
def _gather(records, ids, out, count, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    place, column = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = place < count
    row = tl.load(ids + place, mask=inside, other=0)
    mask = inside[:, None] & (column < width)[None, :]
    values = tl.load(records + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    tl.store(out + place[:, None] * width + column[None, :], values.to(tl.float32), mask=mask)


def gather(records: Tensor, ids: Tensor) -> Tensor:
    check_records(records, ids)
    count, width = ids.numel(), records.shape[1]
    out = torch.empty(count, width, device=ids.device)
    wide = triton.next_power_of_2(width)
    rows = max(BLOCK // wide, 1)
    if count:
        _gather[(triton.cdiv(count, rows),)](records, ids, out, count, width, ROWS=rows, WIDTH=wide)
    return out


def gather_twin(records: Tensor, ids: Tensor) -> Tensor:
    return records.index_select(0, ids.to(records.device)).float().to(ids.device)


def check_records(records: Tensor, ids: Tensor) -> None:
    """ValueError where a kernel on the ids' device could not read the records as it takes them to be."""
    if records.dtype not in (torch.float32, torch.bfloat16) or records.dim() != 2 or not records.is_contiguous():
        raise ValueError(
            f"records must be float32 or bfloat16 [R, W] and contiguous, got {records.dtype} {list(records.shape)}, "
            f"strides {records.stride()}: read packed codecs with Table.read"
        )
    if ids.dtype != torch.int64 or not ids.is_contiguous():
        raise ValueError(f"ids must be int64 and contiguous, got {ids.dtype}, strides {ids.stride()}")
    if records.device != ids.device and not records.is_pinned():
        raise ValueError(
            f"records are on {records.device} and the ids on {ids.device}: pin the records (records.pin_memory()), "
            "or move them there"
        )
