"""How Linux maps host memory; elsewhere it is memory like any other."""

from __future__ import annotations

import ctypes
import mmap
import sys
from math import prod

import torch
from torch import Tensor

NORESERVE = 0x4000  # of mmap on Linux: address space is not counted as memory
POPULATE_WRITE = 23  # of madvise, since Linux 5.14
HUGE = 2 << 20


def ask_for_huge_pages(array: Tensor) -> None:
    """Map memory that is not yet written by 2 MiB: a random row then seldom waits for a page table."""
    first, last = -(-array.data_ptr() // HUGE) * HUGE, (array.data_ptr() + array.nbytes) // HUGE * HUGE
    if sys.platform == "linux" and first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)


def reserve(size: int) -> mmap.mmap:
    """Address space for `size` bytes of zeros, maybe more than RAM: memory comes to be when it is written. Linux.

    In pages of 4 KiB: in a virtual machine that hands free memory back to its host, a huge page took 12 ms.
    """
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)


def beginning(place: mmap.mmap, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The first bytes of `place` as a tensor."""
    return torch.frombuffer(place, dtype=dtype, count=prod(shape)).view(shape)


def populate(array: Tensor, begin: int, end: int) -> None:
    """Map the memory of array[begin:end], which is about to be written, at once and not at a fault for each page."""
    size = array[:1].nbytes
    first = (array.data_ptr() + begin * size) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:  # an older Linux refuses, and then it is a fault for each page
        length = array.data_ptr() + end * size - first
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), POPULATE_WRITE)
