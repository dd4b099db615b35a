"""Rows in RAM: one contiguous tensor of records, and rule state for the rows that were ever updated.

A record is a row as the codec stores it (`byrote.tables.codecs`): `rows` is [R, W] for fp32 and bf16, and bytes [R, B]
for the packed codecs. Reading decodes, writing encodes.

Rule state lies in `byrote.tables.touched`. Saved files are plain safetensors, readable by anything:

- rows:  tensor `rows` [R, W] or [R, B]
- state: tensor `rows` [U] (ascending row ids) and one tensor a field [U, ...]
- both:  metadata `byrote` = JSON {format_version, digest, generation, num_rows, width, codec}
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from byrote.tables import gather, pages
from byrote.tables.checksums import discard
from byrote.tables.codecs import CODECS
from byrote.tables.rules import InPlaceRule
from byrote.tables.stream import stream
from byrote.tables.table import RowState, StateFields, check_row_ids
from byrote.tables.touched import CPU, TouchedState

FORMAT_VERSION = 1
HEADER = ("digest", "generation", "num_rows", "width", "codec")
DRAWN = 1 << 16  # rows at a time: a packed table is never held in float32


class RamTable:
    """A table in host memory. `digest` names the address spec that its rows belong to.

    Rows are drawn from N(0, `std`^2) with `seed` when they are first needed, so that a model can be built on the
    meta device, or be about to open its tables from a file, without paying for them.
    """

    device = CPU

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
        self._std, self._seed = std, seed
        self._rows: Tensor | None = None
        self._state = TouchedState(num_rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> RamTable:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a table is not pickled: save the model with save_pretrained, which writes its tables beside it"
        )

    @property
    def rows(self) -> Tensor:
        """All rows as they are stored, [R, W] or [R, B]; drawn on first use."""
        if self._rows is None:
            dtype = self._codec.dtype
            stored = self._codec.record_bytes(self.width) // dtype.itemsize
            rows = torch.empty(self.num_rows, stored, dtype=dtype, device="cpu")
            pages.ask_for_huge_pages(rows)
            at = 0
            for piece in self.pieces():
                rows[at : at + len(piece)] = piece
                at += len(piece)
            self._rows = rows
        return self._rows

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
            values = torch.empty(size, self.width, device="cpu").normal_(0.0, self._std, generator=generator)
            yield self._codec.encode(values, generator).view(self._codec.dtype)

    @property
    def _records(self) -> Tensor:
        return self.rows.view(torch.uint8)

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        here = rows.cpu()  # first of all, so that a device is waited for once
        check_row_ids(here, self.num_rows)
        ids = here.reshape(-1).contiguous()
        values = torch.empty(len(ids), self.width, device="cpu")
        gather.decode(self._records, ids, self._codec, values)
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
        self.writes += 1
        self._scatter(here.contiguous(), records)
        if state is not None:
            self._state.write(here, state)

    def _scatter(self, rows: Tensor, records: Tensor) -> None:
        gather.scatter(self._records, rows, records)

    @torch.no_grad()
    def update(self, rule: InPlaceRule, rows: Tensor, gradient: Tensor, rate: float) -> None:
        """`read`, the rule and `write` in one, without a copy where rows are stored as float32."""
        check_row_ids(rows, self.num_rows)
        if gradient.shape != (len(rows), self.width):
            raise ValueError(f"gradient must be [{len(rows)}, {self.width}], got {list(gradient.shape)}")
        entries = self._state.entries(rows, rule.fields(self.width))
        self.writes += 1
        if self._codec.dtype == torch.float32:
            rule.update_in_place(self.rows, rows.contiguous(), self._state.arrays, entries, gradient, rate)
            return
        values = self.read(rows)
        rule.update_in_place(values, torch.arange(len(rows)), self._state.arrays, entries, gradient, rate)
        self.write(rows, values)

    def _check_state(self, rows: Tensor, state: RowState) -> None:
        lengths = {name: value.shape[0] for name, value in state.items()}
        if set(lengths.values()) - {rows.numel()}:
            raise ValueError(f"rule state must have {rows.numel()} entries, one a row, got {lengths}")
        self._state.check({name: tuple(value.shape[1:]) for name, value in state.items()})

    def commit(self) -> int:
        self.generation += 1
        return self.generation

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
        stream(path, {"rows": (dtype, shape, self.pieces)}, self._header())

    def save_state(self, path: Path) -> None:
        """Rule state of the touched rows, by ascending row id: equal training gives equal bytes."""
        touched = self.touched()
        _save({"rows": touched, **self._state.read(touched, self.fields)}, path, self._header())

    def load_state(self, path: Path) -> None:
        self.replace_state(*load_state_file(path, self))

    def replace_state(self, rows: Tensor, state: RowState) -> None:
        """Forget all rule state, and take that of rows [U]."""
        self._state = TouchedState(self.num_rows, self.device)
        if rows.numel():
            self._state.write(rows.to(self.device), state)

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
        header, arrays = _load(path)
        check_wanted(path, header, {"digest": digest, "num_rows": num_rows, "width": width})
        table = cls(num_rows, width, digest=digest, codec=header["codec"])
        rows, dtype = arrays.get("rows"), table._codec.dtype
        shape = [num_rows, table._codec.record_bytes(width) // dtype.itemsize]
        if rows is None or rows.dtype != dtype or list(rows.shape) != shape:
            found = "no tensor" if rows is None else f"{rows.dtype} {list(rows.shape)}"
            raise ValueError(f"{path}: tensor 'rows' must be {dtype} {shape} as its header says, got {found}")
        table._rows, table.generation = rows, int(header["generation"])
        return table

    def _header(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **{name: getattr(self, name) for name in HEADER}}


def chance(digest: str, generation: int) -> torch.Generator:
    """Of stochastic rounding: it follows from the table and its generation, so that a resumed run repeats it."""
    # One number of 32 bits: a CPU generator takes no more of its seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{digest} {generation}".encode()))


def load_state_file(path: Path, table: Any) -> tuple[Tensor, RowState]:
    """Row ids and rule state that `save_state` wrote of `table`; ValueError where they belong to other rows."""
    header, arrays = _load(path)
    for field in ("digest", "num_rows", "width", "generation"):
        if header[field] != getattr(table, field):
            raise ValueError(
                f"{path}: row state has {field} {header[field]}, the table has {getattr(table, field)}; "
                "take rows and row state from one checkpoint"
            )
    rows = arrays.pop("rows", torch.zeros(1))
    check_row_ids(rows, table.num_rows)
    if {array.shape[0] for array in arrays.values()} - {rows.numel()}:
        raise ValueError(f"{path}: {sorted(arrays)} must have {rows.numel()} entries, one for each of its rows")
    return rows, arrays


def _save(arrays: dict[str, Tensor], path: Path, header: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file(
        {name: array.cpu().contiguous() for name, array in arrays.items()}, temporary, {"byrote": json.dumps(header)}
    )
    discard(path)
    os.replace(temporary, path)


def table_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The header of a table of ours, from the metadata of its file."""
    header = json.loads(metadata.get("byrote", "{}"))
    if header.get("format_version") != FORMAT_VERSION:
        version = header.get("format_version")
        raise ValueError(f"{path}: table format_version {version}, this byrote reads {FORMAT_VERSION}")
    if missing := [name for name in HEADER if name not in header]:
        raise ValueError(f"{path}: the header lacks {missing}; write tables with save_pretrained or Table.save")
    if header["codec"] not in CODECS:
        raise ValueError(f"{path}: codec {header['codec']!r}, this byrote reads {sorted(CODECS)}")
    return header


def check_wanted(path: Path, header: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ValueError where the header is not of the table that is wanted."""
    for field, expected in wanted.items():
        if header[field] != expected:
            raise ValueError(
                f"{path}: {field} is {header[field]}, the model needs {expected}; "
                "the table was made for another address spec or config"
            )


def _load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such table file")
    try:
        with safe_open(path, framework="pt") as file:
            header = table_header(path, file.metadata() or {})
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a table ({error})") from error
