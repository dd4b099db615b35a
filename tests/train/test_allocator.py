"""Freed memory stays: counted in page faults by a process of its own, because it cannot be taken back."""

import ctypes
import resource

import pytest
import torch

from byrote.train.allocator import keep_freed_memory
from tests.processes import on_ranks


def faults() -> int:
    for _ in range(3):
        torch.ones(2**24)  # 64 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def count(rank: int) -> None:
    given_back = faults()
    assert keep_freed_memory()
    assert faults() < 1000 < given_back


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    on_ranks(count, (), 1)
