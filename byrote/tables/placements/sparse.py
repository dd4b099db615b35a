"""A few rows of a large table: ids and values in RAM, found by id, and the small file that carries them.

The file is an ordinary safetensors file:

- tensors `rows` int64 [U] (ascending, unique) and `values` [U, W], or [U, B] bytes for a packed codec
- metadata `byrote` = JSON {format_version, digest, generation, num_rows, width, codec}; here `generation` is how often
  the overlay was committed. It is told and not compared: an overlay may be laid over its table at any moment.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from byrote.tables.codecs import CODECS, chance
from byrote.tables.files.format import header_of, load, row_ids, stream, whole
from byrote.tables.records import decode, scatter
from byrote.tables.row_map import RowMap
from byrote.tables.table import UNKNOWN, check_row_ids


class SparseRows:
    """A few rows of a table of `num_rows`, found by id; memory grows with them and never with the table.

    Records lie in the order in which their rows came, in arrays that grow by doubling; a `RowMap` says where.
    """

    identity = UNKNOWN  # it is no training of its own

    def __init__(self, num_rows: int, width: int, *, digest: str, codec: str = "fp32") -> None:
        if codec not in CODECS:
            raise ValueError(f"codec must be one of {sorted(CODECS)}, got {codec!r}")
        self.num_rows, self.width, self.digest, self.codec = num_rows, width, digest, codec
        self.generation = 0
        self._codec = CODECS[codec]
        self._places = RowMap()
        self._records = torch.empty(0, self._codec.record_bytes(width), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_bytes(self) -> int:
        return self._records.nbytes + self._places.num_bytes

    def ids(self) -> Tensor:
        """The ids of the rows [U], ascending."""
        return torch.from_numpy(self._places.items()[0])

    def find(self, rows: Tensor) -> Tensor:
        """Where the rows [N] lie, -1 for those that are not here."""
        return torch.from_numpy(self._places.get(rows.cpu().numpy()))

    def read(self, places: Tensor) -> Tensor:
        """Values [N, W] float32 of places [N]."""
        return decode(self._records, places, self._codec, torch.empty(len(places), self.width, dtype=torch.float32))

    def write(self, rows: Tensor, values: Tensor) -> Tensor:
        """Store values [N, W] of unique row ids [N]; the place of each."""
        check_row_ids(rows, self.num_rows)
        if values.shape != (len(rows), self.width):
            raise ValueError(f"values must be [{len(rows)}, {self.width}], got {list(values.shape)}")
        records = self._codec.encode(values.to("cpu", torch.float32), chance(self.digest, self.generation))
        return self._put(rows.cpu(), records)

    def save(self, path: Path) -> None:
        ids = self.ids()
        records = self._records.index_select(0, self.find(ids))
        values = records.view(self._codec.dtype) if len(ids) else records.new_empty(0, self._stored, dtype=self._dtype)
        stream(path, {"rows": whole(ids), "values": whole(values)}, header_of(self))

    @classmethod
    def open(cls, path: Path, *, num_rows: int, width: int, digest: str) -> SparseRows:
        """The rows in `path`. ValueError where the file is damaged or belongs to another table."""
        header, arrays = load(path)
        for field, expected in (("digest", digest), ("num_rows", num_rows), ("width", width)):
            if header[field] != expected:
                raise ValueError(
                    f"{path}: {field} is {header[field]}, the table below has {expected}; "
                    "the overlay was made for another address spec or config"
                )
        top = cls(num_rows, width, digest=digest, codec=header["codec"])
        if "values" not in arrays:
            raise ValueError(f"{path}: no tensor 'values'; an overlay is written by SparseRows.save")
        rows, values = row_ids(path, arrays, num_rows), arrays["values"]
        shape = [rows.numel(), top._stored]
        if values.dtype != top._dtype or list(values.shape) != shape:
            raise ValueError(
                f"{path}: tensor 'values' must be {top._dtype} {shape}, for 'rows' {list(rows.shape)} in codec "
                f"{top.codec}, got {values.dtype} {list(values.shape)}"
            )
        if rows.numel():
            top._put(rows, values.view(torch.uint8))
        top.generation = header["generation"]
        return top

    def _put(self, rows: Tensor, records: Tensor) -> Tensor:
        places, before = self.find(rows), len(self)
        fresh = places < 0
        places[fresh] = torch.arange(before, before + int(fresh.sum()))
        self._places.put(rows[fresh].numpy(), places[fresh].numpy())
        self._records = grown(self._records, len(self))
        scatter(self._records, places, records.contiguous())
        return places

    @property
    def _dtype(self) -> torch.dtype:
        return self._codec.dtype

    @property
    def _stored(self) -> int:
        return self._codec.record_bytes(self.width) // self._dtype.itemsize


def grown(array: Tensor, needed: int) -> Tensor:
    """The array with room for `needed` entries, doubled where it had less; what is new is zero."""
    if len(array) >= needed:
        return array
    larger = array.new_zeros(max(needed, 2 * len(array)), *array.shape[1:])
    larger[: len(array)] = array
    return larger
