"""Hot rows of a slow table, in RAM under a byte budget.

N-grams are Zipfian: a few rows are most of the reads. A row is let in only if it is read more often than the row that
would have to leave (TinyLFU, Einziger et al. 2017, arXiv 1512.00727), so that the long tail of rows that are read once
does not wash the hot ones out, as it does with LRU.

    places     set-associative: row r may lie in the WAYS places of set h(r); no list, no deletion, a fixed size
    frequency  a count-min sketch of 8-bit counters over all rows that were asked for, halved every `SAMPLE` reads a
               place, so that the past is forgotten
    admission  of a missed row r: an empty place of its set, else the place of the row v with the lowest count, if
               count(r) > count(v)

A batch counts a row once, however often the row occurs in it: once is how often it is read. All of it is
deterministic. `PlainPlaces` is the slow twin of the compiled `Places`.
"""

from __future__ import annotations

import re
import threading
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from byrote.tables.table import RowState, StateFields, Table, check_row_ids

WAYS = 8
SAMPLE = 10
HASHES = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
EMPTY = -1


def num_bytes(budget: int | str) -> int:
    """A byte budget: a number, or one with a unit, as "64MB" (10^6 bytes) or "1GiB" (2^30)."""
    units = {"": 1, "B": 1} | {f"{name}B": 1000**i for i, name in enumerate("KMGT", 1)}
    units |= {f"{name}iB": 1024**i for i, name in enumerate("KMGT", 1)}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", str(budget))
    if found is None or found[2] not in units:
        raise ValueError(f"a cache of {budget!r}: give bytes, as a number or with a unit of {[*units][2:]}")
    return int(float(found[1]) * units[found[2]])


class Places:
    """Which rows are in the cache and where. Row ids int64 [N], unique in one call; places int64, -1 for none."""

    def __init__(self, num_places: int) -> None:
        if num_places < WAYS:
            raise ValueError(f"a cache has at least {WAYS} places, got {num_places}: raise its byte budget")
        self.sets = num_places // WAYS
        self.rows = np.full((self.sets, WAYS), EMPTY, np.int64)
        self.counts = np.zeros((2, _power_of_two(4 * num_places)), np.uint8)
        self.reads = 0

    def find(self, rows: np.ndarray) -> np.ndarray:
        """Count the rows as read once more; the place of each, or -1."""
        self._age(len(rows))
        places = np.empty(len(rows), np.int64)
        _compiled()[0](self.rows, self.counts, rows, places)
        return places

    def admit(self, rows: np.ndarray) -> np.ndarray:
        """Let missed rows in where they are worth it; the place of each that is now in the cache, or -1."""
        places = np.empty(len(rows), np.int64)
        _compiled()[1](self.rows, self.counts, rows, places)
        return places

    def peek(self, rows: np.ndarray) -> np.ndarray:
        """The place of each row, or -1; nothing is counted."""
        places = np.empty(len(rows), np.int64)
        _compiled()[2](self.rows, rows, places)
        return places

    def _age(self, reads: int) -> None:
        self.reads += reads
        if self.reads >= SAMPLE * self.rows.size:
            self.counts >>= 1
            self.reads = 0


class PlainPlaces(Places):
    """The same, one row after the other."""

    def find(self, rows: np.ndarray) -> np.ndarray:
        self._age(len(rows))
        for row in rows.tolist():
            for table, slot in enumerate(self._slots(row)):
                self.counts[table, slot] = min(255, int(self.counts[table, slot]) + 1)
        return self.peek(rows)

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


class CachedTable:
    """A table that keeps the hot rows of `base` in at most `budget` bytes. What it reads is what `base` reads, bit by
    bit; writes go through. Cached values are float32, or bfloat16 where `base` stores that.
    """

    def __init__(self, base: Table, budget: int) -> None:
        self.base = base
        self._dtype = torch.bfloat16 if str(base.stats().get("codec")).startswith("bf16") else torch.float32
        bookkeeping = 8 + 2 * 8  # the row id, and the counters at their largest
        self.places = Places(min(budget // (base.width * self._dtype.itemsize + bookkeeping), base.num_rows + WAYS))
        self._values = torch.zeros(self.places.rows.size, base.width, dtype=self._dtype)
        self._lock = threading.Lock()
        self.clear_stats()

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedTable:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a table is not pickled: save the model with save_pretrained, which writes its tables")

    num_rows = property(lambda self: self.base.num_rows)
    width = property(lambda self: self.base.width)
    digest = property(lambda self: self.base.digest)
    generation = property(lambda self: self.base.generation)

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        check_row_ids(rows, self.num_rows)
        unique, inverse = torch.unique(rows.reshape(-1).cpu(), return_inverse=True)
        with self._lock:
            places = torch.from_numpy(self.places.find(unique.numpy()))
            hit = places >= 0
            values = torch.empty(len(unique), self.width)
            values[hit] = self._values.index_select(0, places[hit]).float()
            missed = unique[~hit]
            if len(missed):
                fetched = self.base.read(missed)
                values[~hit] = fetched
                admitted = torch.from_numpy(self.places.admit(missed.numpy()))
                kept = admitted >= 0
                self._values[admitted[kept]] = fetched[kept].to(self._dtype)
            self._reads += rows.numel()
            self._read_hits += int(hit[inverse].sum())
            self._unique += len(unique)
            self._unique_hits += len(unique) - len(missed)
            self._batches += 1
        return values.index_select(0, inverse).view(*rows.shape, self.width).to(rows.device)

    def read_state(self, rows: Tensor, fields: StateFields) -> RowState:
        return self.base.read_state(rows, fields)

    @torch.no_grad()
    def write(self, rows: Tensor, values: Tensor, state: RowState | None = None) -> None:
        with self._lock:
            self.base.write(rows, values, state)
            places = torch.from_numpy(self.places.peek(rows.cpu().numpy()))
            inside = places >= 0
            if inside.any():  # as the base has stored them
                self._values[places[inside]] = self.base.read(rows.cpu()[inside]).to(self._dtype)

    def commit(self) -> int:
        return self.base.commit()

    def save(self, path: Path) -> None:
        self.base.save(path)

    def save_state(self, path: Path) -> None:
        self.base.save_state(path)

    def load_state(self, path: Path) -> None:
        self.base.load_state(path)

    def clear_stats(self) -> None:
        self._reads = self._read_hits = self._unique = self._unique_hits = self._batches = 0

    def stats(self) -> dict[str, Any]:
        """Those of the base, and of the cache since `clear_stats`.

        `hits`: share of all ids that were in the cache; `unique_hits`: share of the rows of each batch, so that
        1 - unique_hits is what the base was read for.
        """
        return self.base.stats() | {
            "cache_rows": int((self.places.rows != EMPTY).sum()),
            "cache_bytes": self._values.nbytes + self.places.rows.nbytes + self.places.counts.nbytes,
            "hits": self._read_hits / max(1, self._reads),
            "unique_hits": self._unique_hits / max(1, self._unique),
            "unique_rows_per_batch": self._unique / max(1, self._batches),
            "rows_fetched": self._unique - self._unique_hits,
        }


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@cache
def _compiled() -> tuple[Any, Any, Any]:
    """find, admit, peek; compiled at first use and kept on disk."""
    from numba import njit

    empty, ways = EMPTY, WAYS
    set_hash, first, second = (np.uint64(h) for h in HASHES)
    half = np.uint64(32)

    @njit("void(int64[:, ::1], int64[::1], int64[::1])", cache=True, nogil=True)
    def peek(kept, rows, places):
        sets = np.uint64(kept.shape[0])
        for i in range(len(rows)):
            at = np.int64(((np.uint64(rows[i]) * set_hash) >> half) % sets)
            places[i] = empty
            for way in range(ways):
                if kept[at, way] == rows[i]:
                    places[i] = at * ways + way

    @njit("uint8(uint8[:, ::1], int64)", cache=True, nogil=True)
    def count(counts, row):
        last = np.uint64(counts.shape[1] - 1)
        one = counts[0, np.int64(((np.uint64(row) * first) >> half) & last)]
        other = counts[1, np.int64(((np.uint64(row) * second) >> half) & last)]
        return min(one, other)

    @njit("void(int64[:, ::1], uint8[:, ::1], int64[::1], int64[::1])", cache=True, nogil=True)
    def find(kept, counts, rows, places):
        last = np.uint64(counts.shape[1] - 1)
        for i in range(len(rows)):
            one = np.int64(((np.uint64(rows[i]) * first) >> half) & last)
            other = np.int64(((np.uint64(rows[i]) * second) >> half) & last)
            if counts[0, one] < 255:
                counts[0, one] += 1
            if counts[1, other] < 255:
                counts[1, other] += 1
        peek(kept, rows, places)

    @njit("void(int64[:, ::1], uint8[:, ::1], int64[::1], int64[::1])", cache=True, nogil=True)
    def admit(kept, counts, rows, places):
        sets = np.uint64(kept.shape[0])
        for i in range(len(rows)):
            at = np.int64(((np.uint64(rows[i]) * set_hash) >> half) % sets)
            chosen, lowest, present = -1, 256, False
            for way in range(ways):
                other = kept[at, way]
                if other == rows[i]:
                    present = True
                worth = -1 if other == empty else int(count(counts, other))
                if worth < lowest:
                    chosen, lowest = way, worth
            if not present and int(count(counts, rows[i])) > lowest:
                kept[at, chosen] = rows[i]
        peek(kept, rows, places)

    return find, admit, peek
