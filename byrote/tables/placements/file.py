"""FileTable: rows in a file, opened in place and only read. It reads what a RamTable of that file reads, bit by bit.

    FileTable.open(path, ...)                    a table of ours; values and scales of a row are one record: one read
    FileTable.released(path, values, scales)     tensors of a released checkpoint (`released.py`), as they are

How rows get from the file into memory: `rowsfile.py`. To train such a table, put a log of changed rows over it:
`LoggedTable`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from byrote.tables.codecs import CODECS
from byrote.tables.files.format import check_wanted, header_of, identity_in, save_state_file, stream, table_header
from byrote.tables.files.headers import read_header
from byrote.tables.files.released import NUMBERS, Form
from byrote.tables.files.rows import RowsFile
from byrote.tables.records import decode
from byrote.tables.rules import RowRule
from byrote.tables.table import UNKNOWN, Followers, RowState, StateFields, Table, check_row_ids

CHUNK_BYTES = 16 << 20  # of rows in memory while a file is written
DTYPES = {"U8": torch.uint8, **NUMBERS}


class FileTable(Table):
    """R rows of W values. `codec`: in which rows can be stored without loss; `path`: of the file, or of the folder."""

    def __init__(
        self, path: Path, values: RowsFile, *, width: int, codec: str, digest: str, generation: int = 0,
        identity: int = UNKNOWN, scales: RowsFile | None = None, form: Form | None = None,
    ) -> None:  # fmt: skip
        self.path, self.num_rows, self.width, self.codec = path, values.num_rows, width, codec
        self.digest, self.generation, self.identity, self.form = digest, generation, identity, form
        self._codec, self._values, self._scales = CODECS[codec], values, scales
        self.followers = Followers()

    @classmethod
    def open(cls, path: Path, **wanted: Any) -> FileTable:
        """A file that `Table.save` wrote; `wanted` is what its header must hold: num_rows, width, digest."""
        if not path.is_file():
            raise ValueError(f"{path}: no such table file")
        tensors, metadata = read_header(path)
        header = table_header(path, metadata)
        check_wanted(path, header, wanted)
        num_rows, width, codec = header["num_rows"], header["width"], CODECS[header["codec"]]
        place = tensors.get("rows")
        found = "no tensor" if place is None else f"{DTYPES.get(place.dtype, place.dtype)} {list(place.shape)}"
        shape = [num_rows, codec.record_bytes(width) // codec.dtype.itemsize]
        if place is None or found != f"{codec.dtype} {shape}":
            raise ValueError(f"{path}: tensor 'rows' must be {codec.dtype} {shape} as its header says, got {found}")
        return cls(
            path, RowsFile([place]), width=width, codec=codec.name, digest=header["digest"],
            generation=int(header["generation"]), identity=identity_in(header),
        )  # fmt: skip

    @classmethod
    def released(
        cls, path: Path, values: str | Sequence[str], scales: str | Sequence[str] | None = None, *, digest: str = ""
    ) -> FileTable:
        """Tensors by name, each whole or as a list of parts along rows; `digest`: of the address spec they are for."""
        rows = RowsFile.open(path, values)
        beside = None if scales is None else RowsFile.open(path, scales)
        if len(rows.row_shape) != 1 or (beside is not None and len(beside.row_shape) != 1):
            raise ValueError(f"{path}: {values} must be [rows, width], and scales [rows, scales], got other dimensions")
        if beside is not None and beside.num_rows != rows.num_rows:
            raise ValueError(f"{path}: {values} holds {rows.num_rows} rows, {scales} {beside.num_rows}")
        width = rows.row_shape[0]
        try:
            form = (
                Form(rows.dtype, width) if beside is None else Form(rows.dtype, width, beside.dtype, *beside.row_shape)
            )
        except ValueError as error:
            raise ValueError(f"{path}: {values}: {error}") from None
        return cls(path, rows, width=width, codec=form.codec or "fp32", digest=digest, scales=beside, form=form)

    def __deepcopy__(self, memo: dict[int, Any]) -> FileTable:
        return self  # its rows never change

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        here = rows.cpu()
        check_row_ids(here, self.num_rows)
        ids = here.reshape(-1)
        if self.form is not None and (self._scales is not None or self.form.codec is None):
            values = self._read_released(ids, self.form)
        else:
            values = _empty(len(ids), self.width)
            for records, places, where in self._values.batches(ids):
                part = values if where is None else torch.empty(len(where), self.width, dtype=torch.float32)
                decode(records, places, self._codec, part)
                if where is not None:
                    values[where] = part
        return values.view(*rows.shape, self.width).to(rows.device, non_blocking=True)

    def _read_released(self, ids: Tensor, form: Form) -> Tensor:
        unique, inverse = torch.unique(ids, return_inverse=True)
        records = self._values.read(unique)
        scales = None if self._scales is None else self._scales.read(unique)
        if form.codec is None or scales is None:
            return form.decode(records, scales).index_select(0, inverse)
        return decode(torch.cat([records, scales], 1), inverse, self._codec, _empty(len(ids), self.width))

    def cold(self, rows: Tensor) -> bool:
        ids = rows.reshape(-1)
        check_row_ids(ids, self.num_rows)
        return not all([file.resident(ids) for file in self._files()])

    def warm(self, rows: Tensor) -> None:
        ids = rows.reshape(-1)
        check_row_ids(ids, self.num_rows)
        for file in self._files():
            file.warm(ids)

    def _files(self) -> list[RowsFile]:
        return [self._values] if self._scales is None else [self._values, self._scales]

    def read_state(self, rows: Tensor, fields: StateFields) -> RowState:
        """Zeros: a file of rows has no rule state."""
        check_row_ids(rows, self.num_rows)
        return {
            name: torch.zeros(rows.numel(), *shape, dtype=torch.float32, device=rows.device)
            for name, shape in fields.items()
        }

    def write(self, rows: Tensor, values: Tensor, state: RowState | None = None) -> None:
        self.refuse()

    def commit(self) -> int:
        self.refuse()

    def load_state(self, path: Path) -> None:
        self.refuse()

    def check_rule(self, rule: RowRule) -> None:
        self.refuse()

    def refuse(self) -> NoReturn:
        """Say that rows cannot be changed here, and what to do."""
        raise ValueError(
            f"the table {self.path} is open for reading only and is never rewritten. To train it: "
            "from_pretrained(placement='host') takes it into RAM, train.placement='file' in a recipe keeps what "
            "changes in a log; to leave it as it is: model.memory_stack.requires_grad_(False)"
        )

    def save(self, path: Path) -> None:
        """A file of ours with the same rows: a copy, or where the rows are released tensors, in `codec`."""
        dtype, size = self._codec.dtype, self._codec.record_bytes(self.width)

        def pieces() -> Iterator[Tensor]:
            for ids in torch.arange(self.num_rows).split(max(1, CHUNK_BYTES // size)):
                records = self._values.read(ids) if self.form is None else self._codec.encode(self.read(ids))
                yield records.view(dtype)

        stream(path, {"rows": (dtype, (self.num_rows, size // dtype.itemsize), pieces)}, header_of(self))

    def save_state(self, path: Path) -> None:
        """Of no touched row."""
        save_state_file(path, self, torch.zeros(0, dtype=torch.int64), {})

    def stats(self) -> dict[str, Any]:
        size = self._values.row_bytes + (0 if self._scales is None else self._scales.row_bytes)
        return {
            "num_rows": self.num_rows,
            "width": self.width,
            "codec": self.codec,
            "bytes": self.num_rows * size,
            "generation": self.generation,
            "rows_touched": 0,
            "state_bytes": 0,
        }


def _empty(rows: int, width: int) -> Tensor:
    """As torch.empty, but of memory that NumPy asks for in huge pages, which large results are sooner filled in; at a
    whole cache line, as torch's is, so that sums over it keep their bits.
    """
    raw = np.empty(4 * rows * width + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return torch.from_numpy(raw[begin : begin + 4 * rows * width].view(np.float32).reshape(rows, width))
