"""RowsFile: the rows of a tensor in ordinary safetensors files, opened in place; read only.

    RowsFile.open(file or checkpoint folder, name)               one tensor
    RowsFile.open(file or checkpoint folder, [name, name, ...])  parts along rows, in order, of one file or several

Opening reads headers and nothing else, whatever the size of the table. Rows are records of bytes; `dtype` says of
what. There are two ways to read random ones, chosen anew for each batch:

    positioned reads  `reads.py`: of unique ids in ascending order, by threads
    the mapping       where `SAMPLE` records, spread over the batch, are all in memory: compiled gathers then run over
                      the mapped file as over a tensor. If a share p of the batch is not in memory, the sample misses
                      that with (1 - p)^SAMPLE, so that a batch of N waits for N / (e SAMPLE) single pages on average
                      at worst. The mapping is advised as random: such a page is one page.

A truncated file is a ValueError, at open or when it is read. The mapping of a file that ends early would be a SIGBUS,
so its size is asked for before each batch. What remains is a file cut, or a device that fails on a page that was just
dropped, between that question and the copy of the same batch; cut no file that is in use.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from byrote.tables.files import reads
from byrote.tables.files.headers import Place, find_tensor
from byrote.tables.table import check_row_ids

SAMPLE = 32  # records


class RowsFile:
    """R rows of `row_bytes` bytes each. Reads run without the GIL, and from several threads if asked."""

    def __init__(self, places: Sequence[Place]) -> None:
        first = places[0]
        for place in places:
            if not place.shape or place.dtype != first.dtype or place.shape[1:] != first.shape[1:]:
                raise ValueError(
                    f"{place.path}: tensor {place.name} is {place.dtype} {list(place.shape)}, not rows as in "
                    f"{first.name}, {first.dtype} {list(first.shape)}: give the parts of one table"
                )
        self.parts = [_Part(place) for place in places]
        self.dtype, self.row_shape = first.dtype, first.shape[1:]
        self.row_bytes = self.parts[0].row_bytes
        self.begins = np.cumsum([0, *(place.shape[0] for place in places)])
        self.num_rows = int(self.begins[-1])

    @classmethod
    def open(cls, path: Path, names: str | Sequence[str]) -> RowsFile:
        return cls([find_tensor(path, name) for name in ([names] if isinstance(names, str) else names)])

    def __reduce__(self) -> NoReturn:
        raise TypeError("a RowsFile is not pickled: hand over its path and names, and open it again")

    def batches(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(records, ids, where): the rows `rows[where]` are `records[ids]`; where None: all of them.

        Row ids int64 [N], which the caller has checked; records uint8 [M, row_bytes], read only: those that were
        asked for, or the whole mapping.
        """
        for part, ids, where in self._by_part(rows):
            yield *part.records(ids), where

    def resident(self, rows: Tensor) -> bool:
        """Whether a sample of the rows is in memory; reads of those that are not have begun."""
        return all([part.resident(ids) for part, ids, _ in self._by_part(sample(rows))])

    def warm(self, rows: Tensor) -> None:
        """Bring rows into memory."""
        for part, ids, _ in self._by_part(rows):
            part.warm(ids)

    def _by_part(self, rows: Tensor) -> Iterator[tuple[_Part, Tensor, Tensor | None]]:
        """(part, ids in it, which of `rows` they are; None: all)"""
        if len(self.parts) == 1:
            yield self.parts[0], rows, None
            return
        part_of = torch.from_numpy(np.searchsorted(self.begins, rows.numpy(), "right") - 1)
        for number in torch.unique(part_of).tolist():
            where = (part_of == number).nonzero().squeeze(1)
            yield self.parts[number], rows[where] - int(self.begins[number]), where

    def read(self, rows: Tensor) -> Tensor:
        """Records uint8 [N, row_bytes] of row ids int64 [N]."""
        check_row_ids(rows, self.num_rows)
        out = torch.empty(len(rows), self.row_bytes, dtype=torch.uint8)
        for records, ids, where in self.batches(rows):
            if where is None:
                torch.index_select(records, 0, ids, out=out)
            else:
                out[where] = records.index_select(0, ids)
        return out


class _Part:
    """A tensor in an open file. The descriptor stays good when the file is renamed or deleted."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.row_bytes = place.num_bytes // max(1, place.shape[0])
        if not place.num_bytes:
            raise ValueError(f"{place.path}: tensor {place.name} {list(place.shape)} holds no rows")
        self.file = open(place.path, "rb", buffering=0)  # noqa: SIM115  open as long as the table is
        if hasattr(os, "posix_fadvise"):  # without it a read of a row is one of many pages
            os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self.end = place.start + place.num_bytes
        self._check_size()
        self._mapped: Tensor | None = None

    def records(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(records, where each id lies in them)"""
        if not len(ids):
            return torch.empty(0, self.row_bytes, dtype=torch.uint8), ids
        self._check_size()
        if self.resident(sample(ids)):
            return self._mapping(), ids.contiguous()
        unique, inverse = np.unique(ids.numpy(), return_inverse=True)
        records = np.empty((len(unique), self.row_bytes), np.uint8)
        with self._saying_what_is_short():
            reads.read([(self.file.fileno(), len(unique))], self._bytes(unique), records)
        return torch.from_numpy(records), torch.from_numpy(inverse)

    def resident(self, ids: Tensor) -> bool:
        return reads.resident(self.file.fileno(), self._bytes(ids.numpy()), self.row_bytes)

    def warm(self, ids: Tensor) -> None:
        with self._saying_what_is_short():
            reads.warm(self.file.fileno(), self._bytes(np.unique(ids.numpy())), self.row_bytes)

    @contextlib.contextmanager
    def _saying_what_is_short(self) -> Iterator[None]:
        try:
            yield
        except ValueError:
            self._check_size()
            raise

    def _bytes(self, ids: np.ndarray) -> np.ndarray:
        """Where in the file the rows begin."""
        return self.place.start + ids * self.row_bytes

    def _mapping(self) -> Tensor:
        if self._mapped is None:
            place = self.place
            mapped: Any = np.memmap(self.file, np.uint8, "r", place.start, (place.shape[0], self.row_bytes))
            if hasattr(mapped._mmap, "madvise"):
                mapped._mmap.madvise(mmap.MADV_RANDOM)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                self._mapped = torch.from_numpy(mapped)
        return self._mapped

    def _check_size(self) -> None:
        found = os.fstat(self.file.fileno()).st_size
        if found < self.end:
            raise ValueError(
                f"{self.place.path}: truncated: {found} bytes, tensor {self.place.name} ends at byte {self.end}; "
                "copy it again, and open it anew"
            )


def sample(ids: Tensor) -> Tensor:
    """About SAMPLE of them, spread over all."""
    return ids[:: max(1, -(-len(ids) // SAMPLE))]
