"""CopiedTable: what `copy.deepcopy` makes of a table that may change. It costs the rows that change afterwards.

    the original changes rows    their values and rule state, as they were, go to the copy first (`keep`)
    the copy changes rows        they go to its own overlay; the original does not see them

So either is trained, or stands still, whatever becomes of the other, and reads what a copy of all rows would read, bit
by bit. The original lives as long as its copies. A row that neither has changed is read from the original, so the copy
of a table in a file or on an accelerator goes on reading there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from byrote.tables.placements.cached import CachedTable
from byrote.tables.placements.overlay import OverlayTable
from byrote.tables.placements.sparse import SparseRows
from byrote.tables.table import RowState, StateFields, check_row_ids


class CopiedTable(OverlayTable):
    """The rows of `base` as they are now, whoever writes on."""

    base: Any  # with `touched` and `fields`, as every table has whose rows can change

    def __init__(self, base: Any, top: SparseRows | None = None) -> None:
        if top is None:
            top = SparseRows(base.num_rows, base.width, digest=base.digest, codec=base.codec)
            top.generation = base.generation  # it seeds the chance by which rows are rounded
        super().__init__(base, top, writable=True)
        self._state_below = (
            base.stats()["rows_touched"] > 0
        )  # the state of rows that neither has changed is the original's
        base.followers.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedTable:
        made = CopiedTable(self.base, copy.deepcopy(self.top, memo))
        made._take(self, memo)
        made._state_below = self._state_below
        return made

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Rows [...] of the original are about to change: they stay what they are here."""
        rows = rows.reshape(-1).cpu()
        fresh = rows[self.top.find(rows) < 0]
        if not len(fresh):
            return
        places = self.top.write(fresh, self.base.read(fresh))
        if self._state_below:
            state = self.base.read_state(fresh, self.base.fields)
            touched = torch.stack([value.view(len(fresh), -1).any(1) for value in state.values()]).any(0)
            self._put_state(places[touched], {name: value[touched] for name, value in state.items()})

    @torch.no_grad()
    def read_state(self, rows: Tensor, fields: StateFields) -> RowState:
        state = super().read_state(rows, fields)
        unchanged = self.top.find(rows) < 0
        if self._state_below and unchanged.any():
            for name, value in self.base.read_state(rows.cpu()[unchanged], fields).items():
                state[name][unchanged.to(rows.device)] = value.to(rows.device)
        return state

    @torch.no_grad()
    def write(self, rows: Tensor, values: Tensor, state: RowState | None = None) -> None:
        check_row_ids(rows, self.num_rows)
        self.keep(rows)  # with its state, which is the copy's own from now on
        super().write(rows, values, state)

    def readdress(self, digest: str) -> None:
        self.digest = digest

    def replace_state(self, rows: Tensor, state: RowState) -> None:
        self.followers.keep(self.touched())
        self._state_below = False
        super().replace_state(rows, state)

    @property
    def fields(self) -> StateFields:
        return self.base.fields if self._state_below else super().fields

    def touched(self) -> Tensor:
        own = super().touched()
        if not self._state_below:
            return own
        below = self.base.touched().cpu()
        return torch.cat([own, below[self.top.find(below) < 0]]).sort().values


def differing(tables: list[Any]) -> Tensor:
    """Ids of the rows in which tables of one shape may differ, ascending: few among copies of one table, else all."""
    if len({id(original(table)) for table in tables}) > 1:
        return torch.arange(tables[0].num_rows)
    own = [table.base if isinstance(table, CachedTable) else table for table in tables]
    changed = [table.top.ids() for table in own if isinstance(table, CopiedTable)]
    return torch.unique(torch.cat(changed)) if changed else torch.zeros(0, dtype=torch.int64)


def original(table: Any) -> Any:
    """What a table is a copy of; itself where it is none."""
    table = table.base if isinstance(table, CachedTable) else table
    return table.base if isinstance(table, CopiedTable) else table
