"""Positioned reads of records from an open file, by threads; a compiled loop beside its plain twin.

    read(fd, start, size, ids [U], out [U, size])     out[i] = bytes start + ids[i] * size of the file, and so many

Two passes over ascending ids. The first asks for each record without waiting (`preadv2` with RWF_NOWAIT): what is in
memory comes at once, and for the rest the kernel starts to read and goes on, so that the device has all of a thread's
records in its queue. The second waits for the rest. A run of neighbouring records is one read.

A record that ends beyond the end of the file is a ValueError, never zeros; an error of the device is an OSError.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from byrote.compiled import numba_is_there

THREADS = 8  # a thread's reads are all under way at once
LEAST = 16  # records for which a thread is worth its start: all reads of one thread are under way at once in any case
RUN_BYTES = 1 << 20  # of neighbours in one read
NOWAIT = getattr(os, "RWF_NOWAIT", None)  # Linux


def read(fd: int, start: int, size: int, ids: np.ndarray, out: np.ndarray, threads: int = THREADS) -> None:
    """Ids int64, unique and ascending; `out` uint8 [U, size], contiguous. The caller has checked the ids."""
    assert out.dtype == np.uint8 and out.shape == (len(ids), size) and out.flags.c_contiguous
    one = _read_compiled if numba_is_there() and NOWAIT is not None else read_twin
    spread(lambda part: one(fd, start, size, ids[part], out[part]), len(ids), min(threads, -(-len(ids) // LEAST)))


def spread(call: Callable[[slice], Any], count: int, threads: int) -> None:
    """call(part) for `threads` parts of range(count), on threads; what one of them raises is raised here."""
    threads = min(threads, count)
    if threads < 2:
        call(slice(0, count))
        return
    cuts = np.linspace(0, count, threads + 1).astype(np.int64).tolist()
    pool = _pool(os.getpid())
    jobs = [pool.submit(call, slice(*ends)) for ends in itertools.pairwise(cuts)]
    for job in jobs:
        job.result()


def resident(fd: int, start: int, size: int, ids: np.ndarray) -> bool:
    """Whether all of these records are in memory; reads of those that are not have begun."""
    scratch = np.empty(size, np.uint8)
    if NOWAIT is None:
        return False
    if not numba_is_there():
        return all(_try(fd, start + record * size, scratch) for record in ids.tolist())
    misses = np.empty(len(ids), np.int64)
    vector = np.array([scratch.ctypes.data, size], np.int64)
    return bool(_kernels().without_waiting(fd, start, size, ids, 0, vector.ctypes.data, vector, misses, 0) == 0)


def read_twin(fd: int, start: int, size: int, ids: np.ndarray, out: np.ndarray) -> None:
    runs = _runs(ids, size)
    missed = [run for run in runs if NOWAIT is None or not _try(fd, start + int(ids[run[0]]) * size, out[slice(*run)])]
    for begin, end in missed:
        place, wanted = start + int(ids[begin]) * size, out[begin:end].reshape(-1)
        done = 0
        while done < len(wanted):
            got = os.preadv(fd, [wanted[done:].data], place + done)
            if not got:
                raise ValueError(f"the file ends at byte {place + done}, before record {int(ids[end - 1])}")
            done += got


def _read_compiled(fd: int, start: int, size: int, ids: np.ndarray, out: np.ndarray) -> None:
    misses, vector = np.empty(len(ids), np.int64), np.empty(2, np.int64)
    place = out.ctypes.data
    kernels, run = _kernels(), max(1, RUN_BYTES // size)
    missed = kernels.without_waiting(fd, start, size, ids, place, vector.ctypes.data, vector, misses, run)
    if kernels.waiting(fd, start, size, ids, place, misses[:missed], run):
        read_twin(fd, start, size, ids, out)  # which says what is wrong


def _runs(ids: np.ndarray, size: int) -> list[tuple[int, int]]:
    """[begin, end) of neighbouring ids, of at most RUN_BYTES."""
    most, runs, begin = max(1, RUN_BYTES // size), [], 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1 or i - begin == most:
            runs.append((begin, i))
            begin = i
    return runs


def _try(fd: int, place: int, out: np.ndarray) -> bool:
    """Whether the bytes came without waiting."""
    assert NOWAIT is not None
    try:
        return os.preadv(fd, [out.reshape(-1).data], place, NOWAIT) == out.size
    except OSError:  # not in memory, or a file system that always waits
        return False


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Of this process: a child that was forked has none of its parent's threads."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="byrote-read")


def _kernels() -> Any:
    from byrote.tables import pread_kernels

    return pread_kernels
