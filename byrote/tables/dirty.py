"""DirtyRows: records that were written and are in no file yet, in a buffer of fixed size; of equal rows the last one.

Beside the `budget` bytes that records and their places take, nothing grows: `put` says when there is no room.
"""

from __future__ import annotations

import numpy as np

from byrote.tables.rowmap import RowMap


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
