"""Hot rows of a slow table, in RAM under a byte budget. Which ones they are: `places.py`.

A read is one compiled pass that finds and counts the ids, and one that copies rows from where they were found; rows
that were not are read from the base, all at once, and let in if they are worth it.
"""

from __future__ import annotations

import copy
import re
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.tables.codecs import CODECS
from byrote.tables.placements.cache_slots import EMPTY, WAYS, make_places
from byrote.tables.records import decode
from byrote.tables.rules import RowRule
from byrote.tables.table import RowState, StateFields, Table, check_row_ids


def num_bytes(budget: int | str) -> int:
    """A byte budget: a number, or one with a unit, as "64MB" (10^6 bytes) or "1GiB" (2^30)."""
    units = {"": 1, "B": 1} | {f"{name}B": 1000**i for i, name in enumerate("KMGT", 1)}
    units |= {f"{name}iB": 1024**i for i, name in enumerate("KMGT", 1)}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", str(budget))
    if found is None or found[2] not in units:
        raise ValueError(f"a cache of {budget!r}: give bytes, as a number or with a unit of {[*units][2:]}")
    return int(float(found[1]) * units[found[2]])


class CachedTable(Table):
    """A table that keeps the hot rows of `base` in at most `budget` bytes. What it reads is what `base` reads, bit by
    bit; writes go through. Cached values are float32, or bfloat16 where `base` stores that.
    """

    def __init__(self, base: Table, budget: int) -> None:
        self.base, self._budget = base, budget
        self._codec = CODECS["bf16" if str(base.stats().get("codec")).startswith("bf16") else "fp32"]
        bookkeeping = 8 + 2 * 8  # the row id, and the counters at their largest
        size = self._codec.record_bytes(base.width)
        self.places = make_places(min(budget // (size + bookkeeping), base.num_rows + WAYS))
        self._values = torch.zeros(self.places.rows.size, base.width, dtype=self._codec.dtype)
        self._records = self._values.view(torch.uint8)
        self._lock = threading.Lock()
        self.clear_stats()

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedTable:
        return CachedTable(copy.deepcopy(self.base, memo), self._budget)

    num_rows = property(lambda self: self.base.num_rows)
    width = property(lambda self: self.base.width)
    digest = property(lambda self: self.base.digest)
    generation = property(lambda self: self.base.generation)
    identity = property(
        lambda self: self.base.identity, lambda self, identity: setattr(self.base, "identity", identity)
    )
    followers = property(lambda self: self.base.followers)
    apart = property(lambda self: self.base.apart)  # type: ignore[assignment]
    writes = property(lambda self: self.base.writes)  # type: ignore[assignment]

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        ids = rows.cpu().reshape(-1).contiguous()
        check_row_ids(ids, self.base.num_rows)
        values = torch.empty(len(ids), self.base.width, dtype=torch.float32)
        with self._lock:
            found = self.places.find(ids.numpy())
            self._reads += len(ids)
            self._read_hits += found.hits
            self._unique += found.unique
            self._fetched += len(found.missed)
            self._batches += 1
            places = torch.from_numpy(found.places)
            if not len(found.missed):
                decode(self._records, places, self._codec, values)
            else:
                self._read_with_misses(places, torch.from_numpy(found.missed), values)
        return values.view(*rows.shape, self.base.width).to(rows.device)

    def _read_with_misses(self, places: Tensor, missed: Tensor, values: Tensor) -> None:
        hit = (places >= 0).nonzero().squeeze(1)
        if len(hit):
            values[hit] = self._values.index_select(0, places[hit]).float()
        fetched = self.base.read(missed)
        absent = (places < 0).nonzero().squeeze(1)
        values[absent] = fetched.index_select(0, -1 - places[absent])
        admitted = torch.from_numpy(self.places.admit(missed.numpy()))
        kept = (admitted >= 0).nonzero().squeeze(1)
        self._values[admitted[kept]] = fetched[kept].to(self._values.dtype)

    def cold(self, rows: Tensor) -> bool:
        missed = self._not_kept(rows)
        return len(missed) > 0 and self.base.cold(missed)

    def warm(self, rows: Tensor) -> None:
        self.base.warm(self._not_kept(rows))

    def _not_kept(self, rows: Tensor) -> Tensor:
        ids = rows.reshape(-1).contiguous()
        check_row_ids(ids, self.base.num_rows)
        return ids[torch.from_numpy(self.places.peek(ids.numpy()) < 0)]

    def read_state(self, rows: Tensor, fields: StateFields) -> RowState:
        return self.base.read_state(rows, fields)

    @torch.no_grad()
    def write(self, rows: Tensor, values: Tensor, state: RowState | None = None) -> None:
        with self._lock:
            self.base.write(rows, values, state)
            places = torch.from_numpy(self.places.peek(rows.cpu().numpy()))
            inside = places >= 0
            if inside.any():  # as the base has stored them
                self._values[places[inside]] = self.base.read(rows.cpu()[inside]).to(self._values.dtype)

    def check_rule(self, rule: RowRule) -> None:
        self.base.check_rule(rule)

    def commit(self) -> int:
        return self.base.commit()

    def save(self, path: Path) -> None:
        self.base.save(path)

    def save_state(self, path: Path) -> None:
        self.base.save_state(path)

    def load_state(self, path: Path) -> None:
        self.base.load_state(path)

    def clear_stats(self) -> None:
        self._reads = self._read_hits = self._unique = self._fetched = self._batches = 0

    def stats(self) -> dict[str, Any]:
        """Those of the base, and of the cache since `clear_stats`.

        `hits`: share of all ids that were in the cache; `unique_hits`: share of the rows of each batch, so that
        1 - unique_hits is what the base was read for, `rows_fetched` rows of `bytes_fetched` bytes.
        """
        base = self.base.stats()
        return base | {
            "cache_rows": int((self.places.rows != EMPTY).sum()),
            "cache_bytes": self._values.nbytes + self.places.rows.nbytes + self.places.counts.nbytes,
            "hits": self._read_hits / max(1, self._reads),
            "unique_hits": (self._unique - self._fetched) / max(1, self._unique),
            "unique_rows_per_batch": self._unique / max(1, self._batches),
            "rows_fetched": self._fetched,
            "bytes_fetched": self._fetched * base["bytes"] // self.num_rows,
        }
