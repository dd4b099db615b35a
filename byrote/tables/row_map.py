"""RowMap: int64 row ids -> int64 values, a hash map that grows with its entries and never with the table.

Entries lie side by side in the order they came (16 bytes each, the arrays grow by a quarter); beside them stand
open-addressed slots, a power of two of them, at most two thirds full, each the int32 index of an entry (-1 = free).
So an entry takes 22 to 32 bytes. Linear probing from Fibonacci hashing: h(k) = (k * 2^64/phi) >> (64 - bits).

The loops are compiled by numba when a map is first made, cached, and leave the GIL. Keys are never removed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ABSENT = -1
SMALLEST = 64


class RowMap:
    """Keys must be >= 0 and so must values: -1 says that a key is absent."""

    def __init__(self) -> None:
        self._keys = np.empty(SMALLEST // 2, np.int64)
        self._values = np.empty(SMALLEST // 2, np.int64)
        self._slots = np.full(SMALLEST, ABSENT, np.int32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes + self._slots.nbytes

    def get(self, keys: np.ndarray) -> np.ndarray:
        """Values [N] of keys [N], -1 where a key is absent."""
        values = np.empty(len(keys), np.int64)
        _loops().get(_int64(keys), values, self._keys, self._values, self._slots)
        return values

    def put(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Set values [N] of keys [N], one after the other: of equal keys the last one stays."""
        keys, values = _int64(keys), _int64(values)
        if keys.shape != values.shape:
            raise ValueError(f"keys and values must be as many, got {keys.shape} and {values.shape}")
        if len(keys) and (keys.min() < 0 or values.min() < 0):
            raise ValueError("keys and values of a RowMap must be >= 0: -1 means absent")
        if self._count + len(keys) > self._room:  # count again without those that are present
            self._reserve(self._count + len(np.unique(keys[self.get(keys) < 0])))
        self._count = _loops().put(keys, values, self._keys, self._values, self._slots, self._count)

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys ascending, and their values."""
        order = np.argsort(self._keys[: self._count])
        return self._keys[: self._count][order], self._values[: self._count][order]

    @property
    def _room(self) -> int:
        return min(len(self._keys), 2 * len(self._slots) // 3)

    def _reserve(self, needed: int) -> None:
        if needed > len(self._keys):
            capacity = max(needed, len(self._keys) + len(self._keys) // 4)
            self._keys = np.concatenate([self._keys[: self._count], np.empty(capacity - self._count, np.int64)])
            self._values = np.concatenate([self._values[: self._count], np.empty(capacity - self._count, np.int64)])
        num_slots = len(self._slots)
        while 3 * needed > 2 * num_slots:
            num_slots *= 2
        if num_slots != len(self._slots):
            self._slots = np.full(num_slots, ABSENT, np.int32)
            _loops().place(self._keys[: self._count], self._slots)


def _int64(array: np.ndarray) -> np.ndarray:
    array = np.require(array, requirements=["C_CONTIGUOUS", "WRITEABLE"])  # what the kernels are compiled for
    if array.dtype != np.int64 and array.size:
        raise ValueError(f"a RowMap maps int64 to int64, got {array.dtype}")
    return array.astype(np.int64, copy=False)


def _loops() -> Any:
    from byrote.tables.loops import row_map

    return row_map
