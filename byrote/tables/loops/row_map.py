"""Find and put the numbers of row ids, in an open-addressed map (`byrote.tables.row_map`). They leave the GIL."""

# No `from __future__ import annotations` here: numba reads the signatures.
import numpy as np

from byrote.compiled.loops import compiled


@compiled()
def find(key, known, slots):
    """The slot of `key`, or the free one where it belongs."""
    mask = np.uint64(len(slots) - 1)
    bits = np.uint64(0)
    while (np.uint64(1) << bits) <= mask:
        bits += np.uint64(1)
    slot = (np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> (np.uint64(64) - bits)
    while slots[slot] >= 0 and known[slots[slot]] != key:
        slot = (slot + np.uint64(1)) & mask
    return np.int64(slot)


@compiled("void(int64[::1], int64[::1], int64[::1], int64[::1], int32[::1])")
def get(keys, values, known, stored, slots):
    for i in range(len(keys)):
        entry = slots[find(keys[i], known, slots)]
        values[i] = stored[entry] if entry >= 0 else -1


@compiled("int64(int64[::1], int64[::1], int64[::1], int64[::1], int32[::1], int64)")
def put(keys, values, known, stored, slots, count):
    for i in range(len(keys)):
        slot = find(keys[i], known, slots)
        if slots[slot] < 0:
            slots[slot] = count
            known[count] = keys[i]
            count += 1
        stored[slots[slot]] = values[i]
    return count


@compiled("void(int64[::1], int32[::1])")
def place(known, slots):
    for entry in range(len(known)):
        slots[find(known[entry], known, slots)] = entry
