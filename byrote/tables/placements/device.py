"""Rows on an accelerator, as a plain tensor: the table in RAM on another device.

Rows are gathered, decoded, encoded and written by torch operations there (the plain twins of the compiled loops), and
the row rule runs there; nothing goes over the host but row ids that come from it. It is for tables that fit beside the
model, with 8 bytes of Adam's state a touched value. Files and bytes are those of `RamTable`.

    DeviceTable(num_rows, width, digest=..., device="cuda")       device="cpu" gives the same bytes, for tests
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.tables.placements.ram import RamTable
from byrote.tables.row_state import TouchedState
from byrote.tables.table import Table, check_row_ids


class DeviceTable(RamTable):
    """Rows and their state as tensors on `device`."""

    asynchronous = settled = True

    def __init__(self, num_rows: int, width: int, *, device: torch.device | str, **kwargs: Any) -> None:
        super().__init__(num_rows, width, **kwargs)
        self.device = torch.device(device)
        self._state = TouchedState(num_rows, self.device)

    @classmethod
    def of(cls, table: RamTable, device: torch.device | str) -> DeviceTable:
        """The rows of a table in RAM and their state, which are drawn there if they were not before."""
        made = cls(table.num_rows, table.width, device=device, digest=table.digest, codec=table.codec)
        made._rows = table.rows.to(made.device)
        made._take_state(table)
        return made

    @classmethod
    def open(  # type: ignore[override]
        cls, path: Path, *, num_rows: int, width: int, digest: str, device: torch.device | str
    ) -> DeviceTable:
        return cls.of(RamTable.open(path, num_rows=num_rows, width=width, digest=digest), device)

    @property
    def rows(self) -> Tensor:
        if self._rows is None:
            self._rows = super().rows.to(self.device)
        return self._rows

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        if rows.device.type == "cpu":  # elsewhere index_select refuses, and the host does not wait to see it
            check_row_ids(rows, self.num_rows)
        records = self._records.index_select(0, rows.reshape(-1).to(self.device))
        values = self._codec.decode(records, self.width)
        return values.view(*rows.shape, self.width).to(rows.device, non_blocking=True)

    def place(self, table: Any) -> Table:
        return DeviceTable.of(table, self.device)

    def _scatter(self, rows: Tensor, records: Tensor) -> None:
        self._records.index_copy_(0, rows, records)


def accelerator() -> torch.device:
    """The accelerator of this process; ValueError where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        raise ValueError(
            "placement='device' keeps tables on an accelerator, and torch sees none here: use placement='host' "
            "(RAM) or placement='file'"
        )
    return torch.device(found.type, torch.accelerator.current_device_index())
