"""Where each changed row of a log is: in the buffer of what is in no file yet, or in a segment.

DirtyRows      records that were written and are in no file yet, of equal rows the last one. Beside the `budget` bytes
               that records and their places take, nothing grows: `put` says when there is no room
LiveRecords    where in the segments the record of each changed row lies, and how much of each segment still holds

A record is alive until its row is pointed elsewhere. Memory: 22 to 32 bytes a row that was ever pointed to (RowMap).
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from byrote.tables.log.segments import segment_of
from byrote.tables.row_map import RowMap


class DirtyRows:
    """Records of `record_bytes` each, uint8; row ids int64."""

    def __init__(self, record_bytes: int, budget: int) -> None:
        self.records = np.empty((max(1, budget // (record_bytes + 32)), record_bytes), np.uint8)
        self._places = RowMap()  # row -> place in the buffer

    def __len__(self) -> int:
        return len(self._places)

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """Bool [N]."""
        return self._places.get(ids) >= 0

    def read_into(self, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
        """found [N]; the heads of what is found of ids [N] go to records [N, up to B]."""
        places = self._places.get(ids)
        found = places >= 0
        records[found] = self.records[places[found], : records.shape[1]]
        return found

    def put(self, ids: np.ndarray, records: np.ndarray) -> bool:
        """Set the records of unique ids, no more than the buffer holds; False, and nothing done, if it is too full."""
        places = self._places.get(ids)
        new = places < 0
        if len(self) + int(new.sum()) > len(self.records):
            return False
        places[new] = len(self) + np.arange(int(new.sum()))
        self.records[places] = records
        self._places.put(ids, places)
        return True

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids ascending, and where their records lie in `records`."""
        return self._places.items()

    def clear(self) -> None:
        self._places = RowMap()


class LiveRecords:
    """Of each changed row the place of its record, int64; of each segment how many of its records still hold."""

    def __init__(self) -> None:
        self._places = RowMap()
        self.alive: Counter[int] = Counter()  # by segment, records that a row points to
        self.written: Counter[int] = Counter()  # records in all

    def places(self, ids: np.ndarray) -> np.ndarray:
        """The place of each row [N], -1 for a row that was never pointed to."""
        return self._places.get(ids)

    def rows(self) -> np.ndarray:
        """Ascending."""
        return self._places.items()[0]

    def point(self, ids: np.ndarray, places: np.ndarray) -> None:
        """The records at these places, of one block, are those of unique ids [N > 0] from now on."""
        before = self._places.get(ids)
        segments, counts = np.unique(segment_of(before[before >= 0]), return_counts=True)
        self.alive.subtract(dict(zip(segments.tolist(), counts.tolist(), strict=True)))
        self._places.put(ids, places)
        segment = int(segment_of(places[0]))
        self.alive[segment] += len(ids)
        self.written[segment] += len(ids)

    def segments(self) -> set[int]:
        """Those with a record that is alive."""
        return {segment for segment, count in self.alive.items() if count}

    def half_dead(self) -> list[int]:
        """Segments of which less than half is alive, but something; the deadest first."""
        found = [segment for segment in self.segments() if 2 * self.alive[segment] < self.written[segment]]
        return sorted(found, key=lambda segment: (self.alive[segment] / self.written[segment], segment))

    def forget(self, segment: int) -> None:
        del self.alive[segment], self.written[segment]
