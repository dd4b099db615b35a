"""Find and admit rows in the slots of a cache (`placements/cache_slots.py`).

Row ids and places int64, counters uint8; all contiguous. They leave the GIL.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import numpy as np

from byrote.compiled import loops
from byrote.tables.loops import EMPTY, HASHES, WAYS
from byrote.tables.loops.memory import prefetch

AHEAD = 12  # ids: how early the memory of a set and of its counters is asked for
OF_SET, FIRST, SECOND = (np.uint64(h) for h in HASHES)
HALF = np.uint64(32)


def _compiled(function):
    return loops.compiled()(function)


@_compiled
def _set_of(row, sets):
    return np.int64(((np.uint64(row) * OF_SET) >> HALF) % np.uint64(sets))


@_compiled
def _place_of(kept, row):
    at = _set_of(row, kept.shape[0])
    for way in range(WAYS):
        if kept[at, way] == row:
            return at * WAYS + way
    return EMPTY


@_compiled
def _counters(counts, row):
    last = np.uint64(counts.shape[1] - 1)
    one = np.int64(((np.uint64(row) * FIRST) >> HALF) & last)
    return one, np.int64(((np.uint64(row) * SECOND) >> HALF) & last)


@_compiled
def _count(counts, row):
    one, other = _counters(counts, row)
    return min(counts[0, one], counts[1, other])


@_compiled
def peek(kept, rows, places):
    for i in range(len(rows)):
        places[i] = _place_of(kept, rows[i])


@_compiled
def find(kept, counts, rows, places, missed):
    """(missed, unique, hits): how many; see `Found`."""
    size = 16
    while size < 2 * len(rows):
        size *= 2
    seen = np.full(size, -1, np.int32)  # by hash: the index at which a row occurred first
    misses, unique, hits = 0, 0, 0
    for i in range(len(rows)):
        if i + AHEAD < len(rows):
            coming = rows[i + AHEAD]
            one, other = _counters(counts, coming)
            prefetch(kept.ctypes.data + 8 * WAYS * _set_of(coming, kept.shape[0]))
            prefetch(counts.ctypes.data + one)
            prefetch(counts.ctypes.data + counts.shape[1] + other)
        row = rows[i]
        slot = np.int64((np.uint64(row) * FIRST) >> HALF) & (size - 1)
        while seen[slot] >= 0 and rows[seen[slot]] != row:
            slot = (slot + 1) & (size - 1)
        if seen[slot] >= 0:
            places[i] = places[seen[slot]]
        else:
            seen[slot] = i
            unique += 1
            one, other = _counters(counts, row)
            counts[0, one] = min(counts[0, one], 254) + 1
            counts[1, other] = min(counts[1, other], 254) + 1
            places[i] = _place_of(kept, row)
            if places[i] < 0:
                missed[misses] = row
                misses += 1
                places[i] = -misses
        if places[i] >= 0:
            hits += 1
    return misses, unique, hits


@_compiled
def admit(kept, counts, rows, places):
    for i in range(len(rows)):
        at = _set_of(rows[i], kept.shape[0])
        chosen, lowest, present = -1, 256, False
        for way in range(WAYS):
            other = kept[at, way]
            if other == rows[i]:
                present = True
            worth = -1 if other == EMPTY else int(_count(counts, other))
            if worth < lowest:
                chosen, lowest = way, worth
        if not present and int(_count(counts, rows[i])) > lowest:
            kept[at, chosen] = rows[i]
    peek(kept, rows, places)
