"""Positioned reads of records from open files, by threads; a compiled loop beside its plain twin.

    read(files, places [U], out [U, size])     out[i] = the `size` bytes at byte places[i] of its file

`files`: (descriptor, how many of the places are its), one after the other. Two passes over the places of a part of a
file. The first asks for each record without waiting (`preadv2` with RWF_NOWAIT): what is in
memory comes at once, and for the rest the kernel starts to read and goes on, so that the device has all of a thread's
records in its queue. The second waits for the rest. A run of neighbouring records is one read.

A record that ends beyond the end of the file is a ValueError, never zeros; an error of the device is an OSError.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from byrote.compiled.loops import numba_is_there

THREADS = 8  # a thread's reads are all under way at once
LEAST = 16  # records for which a thread is worth its start: all reads of one thread are under way at once in any case
RUN_BYTES = 1 << 20  # of neighbours in one read
WARM_BYTES = 4 << 20  # of records that are read at a time and thrown away
NOWAIT = getattr(os, "RWF_NOWAIT", None)  # Linux


def read(files: Sequence[tuple[int, int]], places: np.ndarray, out: np.ndarray, threads: int = THREADS) -> None:
    """Places int64, of each file ascending; `out` uint8 [U, size], contiguous. What a thread raises is raised here."""
    assert out.dtype == np.uint8 and len(out) == len(places) and out.flags.c_contiguous
    one = _read_compiled if numba_is_there() and NOWAIT is not None else read_twin
    count = min(threads, -(-len(places) // LEAST))
    ends = np.cumsum([number for _, number in files])
    cuts = np.unique(np.concatenate([[0], ends, np.linspace(0, len(places), count + 1).astype(np.int64)])).tolist()
    parts = [(files[int(np.searchsorted(ends, begin, "right"))][0], begin, end) for begin, end in pairwise(cuts)]
    if len(parts) == 1:
        one(parts[0][0], places, out)
        return
    pool = _pool(os.getpid())
    jobs = [pool.submit(one, fd, places[begin:end], out[begin:end]) for fd, begin, end in parts]
    for job in jobs:
        job.result()


def resident(fd: int, places: np.ndarray, size: int) -> bool:
    """Whether all of these records are in memory; reads of those that are not have begun."""
    scratch = np.empty(size, np.uint8)
    if NOWAIT is None:
        return False
    if not numba_is_there():
        return all(_try(fd, place, scratch) for place in places.tolist())
    misses = np.empty(len(places), np.int64)
    vector = np.array([scratch.ctypes.data, size], np.int64)
    return bool(_loops().without_waiting(fd, places, size, 0, vector.ctypes.data, vector, misses, 0) == 0)


def warm(fd: int, places: np.ndarray, size: int) -> None:
    """Bring records of ascending places into memory."""
    most = max(1, WARM_BYTES // size)
    records = np.empty((min(most, len(places)), size), np.uint8)
    for at in range(0, len(places), most):
        some = places[at : at + most]
        read([(fd, len(some))], some, records[: len(some)])


def read_twin(fd: int, places: np.ndarray, out: np.ndarray) -> None:
    runs = _runs(places, out.shape[1])
    missed = [run for run in runs if NOWAIT is None or not _try(fd, int(places[run[0]]), out[slice(*run)])]
    for begin, end in missed:
        place, wanted = int(places[begin]), out[begin:end].reshape(-1)
        done = 0
        while done < len(wanted):
            got = os.preadv(fd, [wanted[done:].data], place + done)
            if not got:
                raise ValueError(
                    f"the file ends at byte {place + done}, before the record at byte {int(places[end - 1])}"
                )
            done += got


def _read_compiled(fd: int, places: np.ndarray, out: np.ndarray) -> None:
    misses, vector = np.empty(len(places), np.int64), np.empty(2, np.int64)
    size, into = out.shape[1], out.ctypes.data
    kernels, run = _loops(), max(1, RUN_BYTES // size)
    missed = kernels.without_waiting(fd, places, size, into, vector.ctypes.data, vector, misses, run)
    if kernels.waiting(fd, places, size, into, misses[:missed], run):
        read_twin(fd, places, out)  # which says what is wrong


def _runs(places: np.ndarray, size: int) -> list[tuple[int, int]]:
    """[begin, end) of neighbouring records, of at most RUN_BYTES."""
    most, runs, begin = max(1, RUN_BYTES // size), [], 0
    for i in range(1, len(places) + 1):
        if i == len(places) or places[i] != places[i - 1] + size or i - begin == most:
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


def _loops() -> Any:
    from byrote.tables.loops import reads

    return reads
