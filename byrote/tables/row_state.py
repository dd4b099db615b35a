"""Rule state of the rows that were ever updated, in arrays of one entry a *touched* row, in the order of first touches.

    directory [R] int32      where a row's entry is; 0: the row was never touched
    arrays    [1 + U, ...]   one a field of the rule; entry 0 stays zero and is what a row without state reads

The arrays grow by doubling. In host memory (Linux) address space for all R rows is reserved, of which the system fills
in what is used, and a longer array is the same memory: no step pays for a copy.
"""

from __future__ import annotations

import mmap
import sys
from math import prod

import torch
from torch import Tensor

from byrote.compiled.loops import numba_is_there
from byrote.tables import host_memory
from byrote.tables.rules import CPU, RowState, StateFields


class TouchedState:
    """Rule state of at most `num_rows` rows on `device`: float32 arrays that grow with the rows touched (see above)."""

    def __init__(self, num_rows: int, device: torch.device = CPU) -> None:
        self.num_rows, self.device = num_rows, device
        self.count = 0  # of touched rows
        self.arrays: RowState = {}
        self._directory: Tensor | None = None
        self._places: dict[str, mmap.mmap] = {}
        self._reserves = device.type == "cpu" and sys.platform == "linux"

    @property
    def fields(self) -> StateFields:
        """Names and shapes of what is kept; none before the first is written or read."""
        return {name: tuple(array.shape[1:]) for name, array in self.arrays.items()}

    @property
    def nbytes(self) -> int:
        """Of the entries in use, and of the directory."""
        entries = sum((1 + self.count) * prod(shape) * 4 for shape in self.fields.values())
        return entries + (0 if self._directory is None else self._directory.nbytes)

    def check(self, fields: StateFields) -> None:
        if self.arrays and self.fields != dict(fields):
            raise ValueError(f"the table keeps rule state {sorted(self.arrays)}, the rule asks for {sorted(fields)}")

    def rows(self) -> Tensor:
        """Ids of the touched rows [U], ascending."""
        if self._directory is None:
            return torch.zeros(0, dtype=torch.int64, device=self.device)
        return self._directory.nonzero().squeeze(1)

    def read(self, rows: Tensor, fields: StateFields) -> RowState:
        if not fields:  # of a table that keeps none yet: it must stay free to keep any
            return {}
        entries = self._open(fields).index_select(0, rows).long()
        return {name: self.arrays[name].index_select(0, entries) for name in fields}

    def write(self, rows: Tensor, state: RowState) -> None:
        entries = self.entries(rows, {name: tuple(value.shape[1:]) for name, value in state.items()})
        for name, value in state.items():
            self.arrays[name].index_copy_(0, entries, value.to(self.device, torch.float32))

    def entries(self, rows: Tensor, fields: StateFields) -> Tensor:
        """Where the state of unique rows [U] lies in the arrays; those that have none yet get a place."""
        directory = self._open(fields)
        if self.device.type == "cpu" and numba_is_there():
            from byrote.tables.loops import rules

            entries = torch.empty(len(rows), dtype=torch.int64)
            found = rules.claim(directory.numpy(), rows.contiguous().numpy(), self.count, entries.numpy())
            fresh = int(found) - self.count
        else:
            entries = directory.index_select(0, rows).long()
            new = entries == 0
            fresh = int(new.sum())
            entries[new] = torch.arange(self.count + 1, self.count + 1 + fresh, device=self.device)
            directory.index_copy_(0, rows, entries.int())
        self.count += fresh
        self._grow(self.count + 1)
        for array in self.arrays.values() if self._reserves else ():
            host_memory.populate(array, self.count + 1 - fresh, self.count + 1)
        return entries

    def _open(self, fields: StateFields) -> Tensor:
        self.check(fields)
        if self._directory is None:
            if self._reserves:
                place = host_memory.reserve(4 * self.num_rows)
                self._directory = host_memory.beginning(place, (self.num_rows,), torch.int32)
            else:
                self._directory = torch.zeros(self.num_rows, dtype=torch.int32, device=self.device)
        if not self.arrays:
            self.arrays = {
                name: torch.zeros(1, *shape, dtype=torch.float32, device=self.device) for name, shape in fields.items()
            }
            if self._reserves:
                sizes = {name: 4 * prod(shape) * (self.num_rows + 1) for name, shape in fields.items()}
                self._places = {name: host_memory.reserve(size) for name, size in sizes.items()}
        return self._directory

    def _grow(self, needed: int) -> None:
        for name, array in self.arrays.items():
            if len(array) >= needed:
                continue
            shape = (min(max(needed, 2 * len(array), 1024), self.num_rows + 1), *array.shape[1:])
            if self._reserves:  # the same memory, and more of it
                self.arrays[name] = host_memory.beginning(self._places[name], shape, torch.float32)
            else:
                self.arrays[name] = array.new_zeros(shape)
                self.arrays[name][: len(array)] = array
