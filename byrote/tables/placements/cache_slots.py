"""Which rows a cache holds, and where: set-associative places with frequency-aware admission.

N-grams are Zipfian: a few rows are most of the reads. A row is let in only if it is read more often than the row that
would have to leave (TinyLFU, Einziger et al. 2017, arXiv 1512.00727), so that the long tail of rows that are read once
does not wash the hot ones out, as it does with LRU.

    places     row r may lie in the WAYS places of set h(r); no list, no deletion, a fixed size
    frequency  a count-min sketch of 8-bit counters over all rows that were asked for, halved every `SAMPLE` reads a
               place, so that the past is forgotten
    admission  of a missed row r: an empty place of its set, else the place of the row v with the lowest count, if
               count(r) > count(v)

A batch counts a row once, however often the row occurs in it: once is how often it is read. All of it is
deterministic. `PlainPlaces` is the slow twin of the compiled `Places`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from byrote.compiled.loops import numba_is_there
from byrote.tables.loops import EMPTY, HASHES, WAYS

SAMPLE = 10


class Found(NamedTuple):
    """places [N]: of each id; where there is none, -1 - (its index in `missed`). missed [M]: in order of occurrence,
    each once. `unique`: distinct ids. `hits`: ids that have a place.
    """

    places: np.ndarray
    missed: np.ndarray
    unique: int
    hits: int


def make_places(num_places: int) -> Places:
    return Places(num_places) if numba_is_there() else PlainPlaces(num_places)


class Places:
    """Row ids are int64 [N]; places int64, -1 for none."""

    def __init__(self, num_places: int) -> None:
        if num_places < WAYS:
            raise ValueError(f"a cache has at least {WAYS} places, got {num_places}: raise its byte budget")
        self.sets = num_places // WAYS
        self.rows = np.full((self.sets, WAYS), EMPTY, np.int64)
        self.counts = np.zeros((2, _power_of_two(4 * num_places)), np.uint8)
        self.reads = 0

    def find(self, rows: np.ndarray) -> Found:
        """Where rows lie, which may occur more than once; each counts as read once more."""
        places, missed = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        misses, unique, hits = _loops().find(self.rows, self.counts, rows, places, missed)
        self._age(unique)
        return Found(places, missed[:misses], unique, hits)

    def admit(self, rows: np.ndarray) -> np.ndarray:
        """Let missed rows in, unique ones, where they are worth it; the place of each that is now in the cache."""
        places = np.empty(len(rows), np.int64)
        _loops().admit(self.rows, self.counts, rows, places)
        return places

    def peek(self, rows: np.ndarray) -> np.ndarray:
        """The place of each row; nothing is counted."""
        places = np.empty(len(rows), np.int64)
        _loops().peek(self.rows, rows, places)
        return places

    def _age(self, reads: int) -> None:
        self.reads += reads
        if self.reads >= SAMPLE * self.rows.size:
            self.counts >>= 1
            self.reads = 0


class PlainPlaces(Places):
    """The same, one row after the other."""

    def find(self, rows: np.ndarray) -> Found:
        unique = list(dict.fromkeys(rows.tolist()))
        for row in unique:
            for table, slot in enumerate(self._slots(row)):
                self.counts[table, slot] = min(255, int(self.counts[table, slot]) + 1)
        where = dict(zip(unique, self.peek(np.array(unique, np.int64)).tolist(), strict=True))
        missed = [row for row in unique if where[row] < 0]
        where |= {row: -1 - i for i, row in enumerate(missed)}
        places = np.array([where[row] for row in rows.tolist()], np.int64)
        self._age(len(unique))
        return Found(places, np.array(missed, np.int64), len(unique), int((places >= 0).sum()))

    def admit(self, rows: np.ndarray) -> np.ndarray:
        for row in rows.tolist():
            ways = self.rows[self._hash(row, 0) % self.sets]
            if row in ways:
                continue
            if EMPTY in ways:
                ways[ways.tolist().index(EMPTY)] = row
                continue
            counts = [self._count(int(other)) for other in ways]
            if self._count(row) > min(counts):
                ways[counts.index(min(counts))] = row
        return self.peek(rows)

    def peek(self, rows: np.ndarray) -> np.ndarray:
        places = []
        for row in rows.tolist():
            at = self._hash(row, 0) % self.sets
            ways = self.rows[at].tolist()
            places.append(at * WAYS + ways.index(row) if row in ways else EMPTY)
        return np.array(places, np.int64)

    def _count(self, row: int) -> int:
        return min(int(self.counts[table, slot]) for table, slot in enumerate(self._slots(row)))

    def _slots(self, row: int) -> list[int]:
        return [self._hash(row, table + 1) & (self.counts.shape[1] - 1) for table in (0, 1)]

    @staticmethod
    def _hash(row: int, which: int) -> int:
        return ((row * HASHES[which]) & (2**64 - 1)) >> 32


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _loops() -> Any:
    from byrote.tables.loops import cache_slots

    return cache_slots
