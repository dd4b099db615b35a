"""Rows in RAM: one contiguous tensor of records, and rule state for the rows that were ever updated.

A record is a row as the codec stores it (`byrote.tables.codecs`): `rows` is [R, W] for fp32 and bf16, and bytes [R, B]
for the packed codecs. Reading decodes, writing encodes.

Rule state lies in `byrote.tables.row_state`; saved files are those of `byrote.tables.files.format`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.tables.codecs import CODECS, chance
from byrote.tables.files.format import (
    check_wanted,
    header_of,
    identity_in,
    load,
    load_state_file,
    save_state_file,
    stream,
)
from byrote.tables.host_memory import ask_for_huge_pages
from byrote.tables.placements.copied import CopiedTable
from byrote.tables.records import decode, scatter
from byrote.tables.row_state import TouchedState
from byrote.tables.rules import CPU, RowRule
from byrote.tables.table import Followers, RowState, StateFields, Table, check_row_ids, first_identity

DRAWN = 1 << 16  # rows at a time: a packed table is never held in float32


class RamTable(Table):
    """A table in host memory. `digest` names the address spec that its rows belong to.

    Rows are drawn from N(0, `std`^2) with `seed` when they are first needed, so that a model can be built on the
    meta device, or be about to open its tables from a file, without paying for them.
    """

    def __init__(
        self, num_rows: int, width: int, *, digest: str, std: float = 0.02, seed: int = 0, codec: str = "fp32"
    ) -> None:
        if num_rows < 1 or width < 1:
            raise ValueError(f"a table needs at least one row and one value, got num_rows={num_rows}, width={width}")
        if codec not in CODECS:
            raise ValueError(f"codec must be one of {sorted(CODECS)}, got {codec!r}")
        self.num_rows, self.width, self.digest, self.codec = num_rows, width, digest, codec
        self._codec = CODECS[codec]
        self.generation = self.writes = 0
        self.identity = first_identity(digest, codec, std, seed)
        self._std, self._seed = std, seed
        self._rows: Tensor | None = None
        self._state = TouchedState(num_rows)
        self.followers = Followers()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return CopiedTable(self)

    @property
    def rows(self) -> Tensor:
        """All rows as they are stored, [R, W] or [R, B]; drawn on first use."""
        if self._rows is None:
            self._rows = self._filled(self.pieces())
        return self._rows

    def _filled(self, pieces: Iterator[Tensor]) -> Tensor:
        """Host memory with all rows."""
        dtype = self._codec.dtype
        rows = torch.empty(
            self.num_rows, self._codec.record_bytes(self.width) // dtype.itemsize, dtype=dtype, device="cpu"
        )
        ask_for_huge_pages(rows)
        at = 0
        for piece in pieces:
            rows[at : at + len(piece)] = piece
            at += len(piece)
        return rows

    @property
    def drawn(self) -> bool:
        return self._rows is not None

    def pieces(self) -> Iterator[Tensor]:
        """All rows as they are stored, in order, some at a time; where they are not drawn yet, nothing is kept."""
        if self._rows is not None:
            yield from (piece.cpu() for piece in self._rows.split(DRAWN))
            return
        generator = torch.Generator().manual_seed(self._seed)
        for at in range(0, self.num_rows, DRAWN):
            size = min(DRAWN, self.num_rows - at)
            values = torch.empty(size, self.width, dtype=torch.float32, device="cpu").normal_(
                0.0, self._std, generator=generator
            )
            yield self._codec.encode(values, generator).view(self._codec.dtype)

    def records(self, begin: int, end: int) -> Tensor:
        """Rows begin to end as they are stored, bytes [end - begin, B]."""
        return self._records[begin:end]

    @property
    def _records(self) -> Tensor:
        return self.rows.view(torch.uint8)

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        here = rows.cpu()  # first of all, so that a device is waited for once
        check_row_ids(here, self.num_rows)
        ids = here.reshape(-1).contiguous()
        values = torch.empty(len(ids), self.width, dtype=torch.float32, device="cpu")
        decode(self._records, ids, self._codec, values)
        return values.view(*rows.shape, self.width).to(rows.device, non_blocking=True)

    @torch.no_grad()
    def read_state(self, rows: Tensor, fields: StateFields) -> RowState:
        here = rows.to(self.device)
        check_row_ids(here, self.num_rows)
        return {name: value.to(rows.device) for name, value in self._state.read(here, fields).items()}

    @torch.no_grad()
    def write(self, rows: Tensor, values: Tensor, state: RowState | None = None) -> None:
        here = rows.to(self.device)
        check_row_ids(here, self.num_rows)
        if values.shape != (rows.numel(), self.width):
            raise ValueError(f"values must be [{rows.numel()}, {self.width}], got {list(values.shape)}")
        if state is not None:
            self._check_state(rows, state)
        records = self._codec.encode(values.to(self.device, torch.float32), chance(self.digest, self.generation))
        self.followers.keep(here)
        self.writes += 1
        self._scatter(here.contiguous(), records)
        if state is not None:
            self._state.write(here, state)

    def _scatter(self, rows: Tensor, records: Tensor) -> None:
        scatter(self._records, rows, records)

    @torch.no_grad()
    def update(self, rule: RowRule, rows: Tensor, gradient: Tensor, rate: float) -> None:
        """By a compiled rule without a copy of the state, and where rows are stored as float32 without one of them."""
        if not rule.compiled or self.device != CPU:
            return super().update(rule, rows, gradient, rate)
        rows, gradient = rows.cpu(), gradient.cpu().contiguous()
        check_row_ids(rows, self.num_rows)
        if gradient.shape != (len(rows), self.width):
            raise ValueError(f"gradient must be [{len(rows)}, {self.width}], got {list(gradient.shape)}")
        self.followers.keep(rows)
        entries = self._state.entries(rows, rule.fields(self.width))
        self.writes += 1
        if self._codec.dtype == torch.float32:
            return rule.update_in_place(self.rows, rows.contiguous(), self._state.arrays, entries, gradient, rate)
        values = self.read(rows)
        rule.update_in_place(values, torch.arange(len(rows)), self._state.arrays, entries, gradient, rate)
        self.write(rows, values)

    def _check_state(self, rows: Tensor, state: RowState) -> None:
        lengths = {name: value.shape[0] for name, value in state.items()}
        if set(lengths.values()) - {rows.numel()}:
            raise ValueError(f"rule state must have {rows.numel()} entries, one a row, got {lengths}")
        self._state.check({name: tuple(value.shape[1:]) for name, value in state.items()})

    def readdress(self, digest: str) -> None:
        self.digest = digest

    def stats(self) -> dict[str, Any]:
        return {
            "num_rows": self.num_rows,
            "width": self.width,
            "codec": self.codec,
            "bytes": self.num_rows * self._codec.record_bytes(self.width),
            "generation": self.generation,
            "rows_touched": self._state.count,
            "state_bytes": self._state.nbytes,
        }

    def save(self, path: Path) -> None:
        """As it is drawn, if it was not needed before: a table that is larger than RAM can be written."""
        dtype = self._codec.dtype
        shape = (self.num_rows, self._codec.record_bytes(self.width) // dtype.itemsize)
        stream(path, {"rows": (dtype, shape, self.pieces)}, header_of(self))

    def save_state(self, path: Path) -> None:
        """Rule state of the touched rows, by ascending row id: equal training gives equal bytes."""
        touched = self.touched()
        save_state_file(path, self, touched, self._state.read(touched, self.fields))

    def load_state(self, path: Path) -> None:
        self.replace_state(*load_state_file(path, self))

    def replace_state(self, rows: Tensor, state: RowState) -> None:
        """Forget all rule state, and take that of rows [U]."""
        self.followers.keep(self.touched())
        self._state = TouchedState(self.num_rows, self.device)
        if rows.numel():
            self._state.write(rows.to(self.device), state)

    def _take_state(self, table: RamTable) -> None:
        """Generation, identity and rule state of a table with the same rows."""
        self.generation, self.identity, touched = table.generation, table.identity, table.touched()
        self.replace_state(touched, table.read_state(touched, table.fields))

    def touched(self) -> Tensor:
        """Ids of the rows with rule state [U], ascending."""
        return self._state.rows()

    @property
    def fields(self) -> StateFields:
        """Names and shapes of the rule state that is kept; none before the first is written or read."""
        return self._state.fields

    @classmethod
    def open(cls, path: Path, *, num_rows: int, width: int, digest: str) -> RamTable:
        """The table in `path`. ValueError where the file is truncated or is not the table that is asked for."""
        header, arrays = load(path)
        check_wanted(path, header, {"digest": digest, "num_rows": num_rows, "width": width})
        table = cls(num_rows, width, digest=digest, codec=header["codec"])
        rows, dtype = arrays.get("rows"), table._codec.dtype
        shape = [num_rows, table._codec.record_bytes(width) // dtype.itemsize]
        if rows is None or rows.dtype != dtype or list(rows.shape) != shape:
            found = "no tensor" if rows is None else f"{rows.dtype} {list(rows.shape)}"
            raise ValueError(f"{path}: tensor 'rows' must be {dtype} {shape} as its header says, got {found}")
        table._rows, table.generation, table.identity = rows, int(header["generation"]), identity_in(header)
        return table
