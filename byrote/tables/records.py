"""Rows out of records and into them: compiled loops beside their plain twins.

    gather(records [R, B], ids [N], out [N, B])        out[i] = records[ids[i]]
    decode(records [R, B], ids [N], codec, out [N, W]) out[i] = the float32 values of records[ids[i]]
    scatter(records [R, B], ids [N], new [N, B])       records[ids[i]] = new[i]
    copy(addresses [N], out [N, B])                    out[i] = the B bytes at an address of this process
    sum_runs(values [M, W], order [M], ends [U])       [U, W]: sums of values[order[j]], ends[i - 1] <= j < ends[i]
    sum_rows(rows [M], values [M, W])                  sums of the values of equal rows, by the one above

Records are uint8, ids int64, values float32, all contiguous and in host memory. The caller has checked that the ids
are in range: a compiled loop reads whatever address it is given. Fast and plain give the same bits.

One thread each: the loops hold no GIL, so callers may run several. The first use in a process imports numba; the
machine code is cached on disk.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from byrote.compiled.loops import numba_is_there

if TYPE_CHECKING:
    from byrote.tables.codecs import Codec


def gather(records: Tensor, ids: Tensor, out: Tensor) -> Tensor:
    _check(records, ids, out, torch.uint8, records.shape[1])
    if not numba_is_there():
        return gather_twin(records, ids, out)
    _loops().gather(records.data_ptr(), records.shape[1], ids.data_ptr(), len(ids), out.data_ptr())
    return out


def gather_twin(records: Tensor, ids: Tensor, out: Tensor) -> Tensor:
    return torch.index_select(records, 0, ids, out=out)


def decode(records: Tensor, ids: Tensor, codec: Codec, out: Tensor) -> Tensor:
    width = out.shape[1]
    _check(records, ids, out, torch.float32, width)
    if records.shape[1] != codec.record_bytes(width):
        raise ValueError(
            f"records of {records.shape[1]} bytes hold no row of {width} values in {codec.name}, "
            f"which takes {codec.record_bytes(width)}: give the width and the codec that they were written with"
        )
    place = records.data_ptr(), records.shape[1], ids.data_ptr(), len(ids), out.data_ptr()
    if not numba_is_there() or codec.name not in _loops().DECODE:
        return decode_twin(records, ids, codec, out)
    if codec.name == "fp32":
        _loops().gather(*place)
    else:
        _loops().DECODE[codec.name](*place, width)
    return out


def decode_twin(records: Tensor, ids: Tensor, codec: Codec, out: Tensor) -> Tensor:
    return out.copy_(codec.decode(records.index_select(0, ids), out.shape[1]))


def scatter(records: Tensor, ids: Tensor, new: Tensor) -> None:
    _check(records, ids, new, torch.uint8, records.shape[1])
    if not numba_is_there():
        return scatter_twin(records, ids, new)
    _loops().scatter(records.data_ptr(), records.shape[1], ids.data_ptr(), len(ids), new.data_ptr())


def scatter_twin(records: Tensor, ids: Tensor, new: Tensor) -> None:
    records.index_copy_(0, ids, new)


def copy(addresses: Tensor, out: Tensor) -> None:
    _check(out, addresses, out, torch.uint8, out.shape[1])
    if not numba_is_there():
        return copy_twin(addresses, out)
    _loops().copy(addresses.data_ptr(), out.shape[1], len(addresses), out.data_ptr())


def copy_twin(addresses: Tensor, out: Tensor) -> None:
    for address, row in zip(addresses.tolist(), out, strict=True):
        ctypes.memmove(row.data_ptr(), address, len(row))


def sum_runs(values: Tensor, order: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Sums [U, W] of values[order[j]] for ends[i - 1] <= j < ends[i], added in that order; which of them are not all 0.

    `ends` [U] ascends to len(order), and no sum is empty. On any device.
    """
    if not numba_is_there() or values.device.type != "cpu" or values.dtype != torch.float32 or not len(ends):
        return sum_runs_twin(values, order, ends)
    assert all(array.is_contiguous() for array in (values, order, ends))
    sums, nonzero = values.new_empty(len(ends), values.shape[1]), torch.empty(len(ends), dtype=torch.bool)
    places = values.data_ptr(), order.data_ptr(), ends.data_ptr()
    _loops().sum_runs(*places, *sums.shape, sums.data_ptr(), nonzero.numpy())
    return sums, nonzero


def sum_runs_twin(values: Tensor, order: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])[: len(ends)]
    sums = F.embedding_bag(order, values, begins, mode="sum")
    return sums, sums.any(dim=1)


def sum_rows(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the values [M, W] of equal row ids [M] -> ascending unique ids [U], sums [U, W], which are not all zero [U].

    The sort is stable and each sum runs in the order of occurrence, so equal input gives equal bits.
    """
    if rows.device.type == "cpu" and len(rows) and int(rows.max()) < 2**31:
        rows = rows.int()  # sorts in half the time
    ordered, order = torch.sort(rows, stable=True)
    unique, counts = torch.unique_consecutive(ordered, return_counts=True)
    return unique.long(), *sum_runs(values.contiguous(), order, counts.cumsum(0))


def _loops() -> Any:
    from byrote.tables.loops import records

    return records


def _check(records: Tensor, ids: Tensor, rows: Tensor, dtype: torch.dtype, width: int) -> None:
    """The loops see addresses only: what is not as they take it to be would be read beyond its end."""
    wanted = {
        "records": (records, torch.uint8, (len(records), records.shape[1])),
        "ids": (ids, torch.int64, (len(ids),)),
    }
    wanted["rows"] = (rows, dtype, (len(ids), width))
    for name, (array, kind, shape) in wanted.items():
        if array.dtype != kind or tuple(array.shape) != shape or not array.is_contiguous() or array.is_cuda:
            raise ValueError(
                f"{name} must be {kind} {list(shape)}, contiguous and in host memory, got {array.dtype} "
                f"{list(array.shape)}, strides {array.stride()}, on {array.device}"
            )
