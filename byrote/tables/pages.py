"""Host memory in huge pages (2 MiB, Linux): a random row then seldom waits for a page table, and large arrays are
sooner filled in. Elsewhere it is memory like any other.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from math import prod

import numpy as np
import torch
from torch import Tensor

NORESERVE = 0x4000  # of mmap on Linux: address space is not counted as memory
HUGE = 2 << 20


def ask_for_huge_pages(array: Tensor) -> None:
    """Let Linux map the memory of `array`, which is not yet written, by 2 MiB."""
    first, last = -(-array.data_ptr() // HUGE) * HUGE, (array.data_ptr() + array.nbytes) // HUGE * HUGE
    if sys.platform == "linux" and first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As torch.zeros; of address space, where memory comes to be when it is written: it may be larger than RAM."""
    if sys.platform != "linux":
        return torch.zeros(shape, dtype=dtype)
    size = max(1, prod(shape)) * dtype.itemsize
    place = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    array = torch.frombuffer(place, dtype=dtype, count=prod(shape)).view(shape)
    ask_for_huge_pages(array)
    return array


def empty(rows: int, width: int) -> Tensor:
    """As torch.empty [rows, width] in float32, of memory that NumPy asks for in huge pages if it is large; at a whole
    cache line, as torch's is, so that sums over it keep their bits.
    """
    raw = np.empty(4 * rows * width + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return torch.from_numpy(raw[begin : begin + 4 * rows * width].view(np.float32).reshape(rows, width))
