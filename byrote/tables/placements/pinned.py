"""Rows in page-locked host memory, which a GPU reads by itself: the table in RAM for a model on a GPU.

A kernel there (`byrote.tables.loops.triton`) takes row ids from the GPU's memory and records over the bus. So the host
neither waits for row ids nor copies rows, and what travels is as small as the codec makes it. Everything else is the
table in RAM: updates run on the host, files and bytes are the same. Pages are locked once, when the rows are first
needed; the system then cannot swap them.

    PinnedTable(num_rows, width, digest=...)        PinnedTable.of(table)
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.tables.placements.ram import RamTable
from byrote.tables.table import Table


class PinnedTable(RamTable):
    """Rows in RAM whose pages are locked."""

    asynchronous = settled = True

    def __init__(self, num_rows: int, width: int, **kwargs: Any) -> None:
        check_gpu()
        super().__init__(num_rows, width, **kwargs)

    @classmethod
    def of(cls, table: RamTable) -> PinnedTable:
        """The rows of a table in RAM, as a copy if there are any yet, since a file's may be mapped; and their state."""
        about = {"digest": table.digest, "codec": table.codec, "std": table._std, "seed": table._seed}
        made = cls(table.num_rows, table.width, **about)
        if table.drawn:
            made._rows = made._filled(table.pieces())
            made._lock()
        made._take_state(table)
        return made

    @classmethod
    def open(cls, path: Path, *, num_rows: int, width: int, digest: str) -> PinnedTable:
        return cls.of(RamTable.open(path, num_rows=num_rows, width=width, digest=digest))

    @property
    def rows(self) -> Tensor:
        if not self.drawn:
            super().rows  # noqa: B018  draws them
            self._lock()
        return super().rows

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        """As of any table, but of row ids on a GPU one that is out of range reads as NaN: the host does not see it."""
        if not rows.is_cuda:
            return super().read(rows)
        from byrote.tables.loops.triton import decode

        values = decode(self._records, rows.reshape(-1).contiguous(), self._codec, self.width)
        return values.view(*rows.shape, self.width)

    def place(self, table: Any) -> Table:
        return PinnedTable.of(table)

    def _lock(self) -> None:
        assert self._rows is not None
        place, runtime = self._rows.data_ptr(), torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(place, self._rows.nbytes, 0))
        weakref.finalize(self, runtime.cudaHostUnregister, place)


def check_gpu() -> None:
    """ValueError where there is no GPU to read rows."""
    if not torch.cuda.is_available():
        raise ValueError(
            "placement='pinned' lets a GPU read rows in RAM by itself, and torch sees no GPU: use placement='host'"
        )
