"""LoggedTable: a table that is trained though its base never changes; changed rows live in a RowLog.

    read(row) = the log's values if it holds the row, else the base's; rule state likewise, else zeros

A record, which holds both, is that of `record.py`. The table equals a RamTable to the last bit.

`checkpoint(path)` makes the present generation durable in the log and writes a pointer, a JSON of a line:
{format_version, log: relative path, generation, identity, committed}. `committed` is the log's number of it, and not
the table's, since a run that was resumed from an earlier checkpoint reaches a generation twice. `save` writes a whole
merged table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from byrote.tables.codecs import chance
from byrote.tables.files.format import FORMAT_VERSION, header_of, identity_in, load_state_file, stream
from byrote.tables.files.headers import check_fields, parse_object
from byrote.tables.files.rows import sample
from byrote.tables.log import disk
from byrote.tables.log.log import FORMAT_VERSION as LOG_VERSION
from byrote.tables.log.log import HEADER, RowLog
from byrote.tables.log.record import Record
from byrote.tables.placements.copied import CopiedTable
from byrote.tables.placements.file import FileTable
from byrote.tables.placements.ram import RamTable
from byrote.tables.table import Followers, RowState, StateFields, Table, check_row_ids

POINTER = ".json"  # instead of a table's .safetensors
CHUNK_BYTES = 16 << 20  # of rows in memory while a file is written
POINTER_FIELDS = {"log": str, "generation": int, "committed": int}


def open_base(path: Path) -> Any:
    """The read-only table under a log."""
    return FileTable.open(path)


def read_pointer(path: Path) -> dict[str, Any]:
    """What `checkpoint` wrote."""
    return disk.read_json(path, FORMAT_VERSION, POINTER_FIELDS, "no such pointer")


def _about(folder: Path) -> dict[str, Any]:
    """What `create` wrote of the base: path, codec, fields."""
    path = folder / "log.json"
    about = parse_object(disk.read_json(path, LOG_VERSION, HEADER, "no log")["base"].encode(), str(path))
    check_fields(about, {"path": str, "codec": str, "fields": dict}, str(path))
    for name, shape in about["fields"].items():
        if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
            raise ValueError(f"{path} is damaged (the shape of rule state {name!r} is {shape!r}); copy it again")
    return about


class LoggedTable(Table):
    """`base`: any table, only read. `fields`: the state of the one rule that trains it."""

    def __init__(self, base: Any, log: RowLog, fields: StateFields, generation: int, identity: int) -> None:
        self.base, self.log, self.record = base, log, Record(base.codec, base.width, fields)
        self.fields = self.record.fields
        self.num_rows, self.width, self.digest, self.codec = base.num_rows, base.width, base.digest, base.codec
        self.generation, self.identity, self.writes = generation, identity, 0
        self.followers = Followers()

    @classmethod
    def create(cls, base: Any, folder: Path, fields: StateFields, path: str = "", **settings: int) -> LoggedTable:
        """With a new log in `folder`; `path`: of the base's file, relative to `folder`."""
        about = {"path": path, "codec": base.codec, "fields": {name: list(shape) for name, shape in fields.items()}}
        size = Record(base.codec, base.width, fields).size
        log = RowLog.create(
            folder, num_rows=base.num_rows, record_bytes=size, digest=base.digest,
            base=json.dumps(about), generation=base.generation, **settings,
        )  # fmt: skip
        return cls(base, log, fields, base.generation, base.identity)

    @classmethod
    def open(cls, path: Path, *, num_rows: int, width: int, digest: str, lock: bool = False) -> LoggedTable:
        """What a pointer names; without `lock`, for reading."""
        pointer = read_pointer(path)
        # Without the checkpoint's own name in it: the folder that the path leads through is removed one day.
        folder = Path(os.path.abspath(path.parent / pointer["log"]))
        if not (folder / "log.json").is_file():
            raise ValueError(
                f"{path} points to the log {folder}, which is not there: a checkpoint of a file-table run is good "
                "only in its run folder; model.save_pretrained makes a folder that stands alone"
            )
        about = _about(folder)
        base = open_base(Path(os.path.abspath(folder / about["path"])))
        if (base.num_rows, base.width, base.digest) != (num_rows, width, digest):
            raise ValueError(
                f"{path}: the table is [{base.num_rows}, {base.width}] with digest {base.digest}, the model needs "
                f"[{num_rows}, {width}] with digest {digest}"
            )
        size = Record(base.codec, base.width, about["fields"]).size
        log = RowLog.open(folder, pointer["committed"], num_rows=num_rows, record_bytes=size, digest=digest, lock=lock)
        return cls(base, log, about["fields"], pointer["generation"], identity_in(pointer))

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiedTable:
        return CopiedTable(self)

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        check_row_ids(rows, self.num_rows)
        flat = rows.reshape(-1).cpu()
        found, records = self.log.read(flat.numpy(), self.record.head)
        logged, rest = (torch.from_numpy(np.flatnonzero(which)) for which in (found, ~found))
        if not len(logged):
            return self.base.read(rows)
        values = torch.empty(len(flat), self.width, dtype=torch.float32)
        values[logged] = self.record.values(records[found])
        if len(rest):
            values[rest] = self.base.read(flat[rest])
        return values.view(*rows.shape, self.width).to(rows.device)

    def cold(self, rows: Tensor) -> bool:
        flat = rows.reshape(-1)
        check_row_ids(flat, self.num_rows)
        logged, rest = self._split(sample(flat))
        cold = self.base.cold(rest)
        return not self.log.resident(logged) or cold  # both are asked, so that both begin to read

    def warm(self, rows: Tensor) -> None:
        flat = rows.reshape(-1)
        check_row_ids(flat, self.num_rows)
        logged, rest = self._split(flat)
        self.base.warm(rest)
        self.log.warm(logged)

    def _split(self, rows: Tensor) -> tuple[np.ndarray, Tensor]:
        """Ids of the rows that are in the log, and of those that are not."""
        held = self.log.holds(rows.numpy())
        return rows.numpy()[held], rows[torch.from_numpy(~held)]

    @torch.no_grad()
    def read_state(self, rows: Tensor, fields: StateFields) -> RowState:
        check_row_ids(rows, self.num_rows)
        self._check_fields({name: tuple(shape) for name, shape in fields.items()})
        _, records = self.log.read(rows.cpu().numpy())
        return {name: self.record.state(records, name).to(rows.device) for name in fields}

    @torch.no_grad()
    def write(self, rows: Tensor, values: Tensor, state: RowState | None = None) -> None:
        check_row_ids(rows, self.num_rows)
        if values.shape != (rows.numel(), self.width):
            raise ValueError(f"values must be [{rows.numel()}, {self.width}], got {list(values.shape)}")
        ids = rows.cpu().numpy()
        if state is None:
            records = self.log.read(ids)[1]  # the state stays
        else:
            if lengths := {name: len(value) for name, value in state.items() if len(value) != len(ids)}:
                raise ValueError(f"rule state must have {len(ids)} entries, one a row, got {lengths}")
            self._check_fields({name: tuple(value.shape[1:]) for name, value in state.items()})
            records = np.empty((len(ids), self.log.record_bytes), np.uint8)
            self.record.set_state(records, state)
        self.followers.keep(rows)
        self.writes += 1
        self.record.set_values(records, values, chance(self.digest, self.generation))
        self.log.write(ids, records)

    def lock(self) -> None:
        self.log.lock()

    def unlock(self) -> None:
        self.log.unlock()

    def close(self) -> None:
        self.log.close()

    def collect(self, pointers: Iterable[Path]) -> None:
        self.log.collect(read_pointer(path)["committed"] for path in pointers)

    def checkpoint(self, path: Path) -> bool:
        """Make this generation durable, and write the pointer to it."""
        committed = self.log.next_generation
        self.log.commit(committed)
        log = os.path.relpath(self.log.folder, path.parent)
        content = {
            "log": log,
            "generation": self.generation,
            "committed": committed,
            "identity": f"{self.identity:016x}",
        }
        disk.replace_json(path, {"format_version": FORMAT_VERSION, **content})
        return True

    def stats(self) -> dict[str, Any]:
        return {
            **self.base.stats(),
            "generation": self.generation,
            "rows_touched": len(self._with_state()),
            "state_bytes": len(self.log) * self.log.record_bytes,
        }

    def save(self, path: Path) -> None:
        def chunks() -> Iterator[Tensor]:
            step = max(1, CHUNK_BYTES // self.log.record_bytes)
            for at in range(0, self.num_rows, step):
                values = self.read(torch.arange(at, min(at + step, self.num_rows)))
                # What was decoded is encoded without loss, by chance or not.
                yield self.record.codec.encode(values, chance(self.digest, self.generation)).view(dtype)

        dtype = self.record.codec.dtype
        shape = (self.num_rows, (self.record.head - 1) // dtype.itemsize)
        stream(path, {"rows": (dtype, shape, chunks)}, header_of(self))

    def save_state(self, path: Path) -> None:
        touched = self.touched()

        def chunks(name: str) -> Callable[[], Iterator[Tensor]]:
            parts = touched.split(max(1, CHUNK_BYTES // self.log.record_bytes))
            return lambda: (self.record.state(self.log.read(part.numpy())[1], name) for part in parts)

        arrays = {"rows": (torch.int64, (len(touched),), lambda: iter([touched]))}
        if len(touched):
            for name in sorted(self.fields):
                arrays[name] = (torch.float32, (len(touched), *self.fields[name]), chunks(name))  # type: ignore[assignment]
        stream(path, arrays, header_of(self))

    def load_state(self, path: Path) -> None:
        rows, arrays = load_state_file(path, self)
        if rows.numel():
            self._check_fields({name: tuple(array.shape[1:]) for name, array in arrays.items()})
        gone = np.setdiff1d(self._with_state(), rows.numpy())
        self.followers.keep(torch.from_numpy(gone))
        records = self.log.read(gone)[1]
        self.record.clear_state(records)
        self.log.write(gone, records)
        if rows.numel():
            self.write(rows, self.read(rows), arrays)

    def changed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, values) of the rows that differ from the base."""
        for part in torch.from_numpy(self.log.rows()).split(max(1, CHUNK_BYTES // self.log.record_bytes)):
            yield part, self.read(part)

    def in_memory(self) -> RamTable:
        """A RamTable with these values, without rule state."""
        table = RamTable.open(self.base.path, num_rows=self.num_rows, width=self.width, digest=self.digest)
        for rows, values in self.changed():
            table.write(rows, values)
        table.generation, table.identity = self.generation, self.identity
        return table

    def touched(self) -> Tensor:
        """Ids of the rows with rule state [U], ascending."""
        return torch.from_numpy(self._with_state())

    def _with_state(self) -> np.ndarray:
        ids = self.log.rows()
        return ids[self.log.read(ids, 1)[1][:, 0] == 1]

    def _check_fields(self, fields: dict[str, tuple[int, ...]]) -> None:
        if fields != self.fields:
            raise ValueError(f"the table keeps rule state {self.fields}, the rule asks for {fields}")
