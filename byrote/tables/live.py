"""LiveRecords: where in the segments the record of each changed row lies, and how much of each segment still holds.

A record is alive until its row is pointed elsewhere. Memory: 22 to 32 bytes a row that was ever pointed to (RowMap).
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from byrote.tables.rowmap import RowMap
from byrote.tables.segment_reads import segment_of


class LiveRecords:
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
