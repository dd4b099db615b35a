"""Segments: the append-only files of a log, and the places of records in them.

    FOLDER/000003.log   blocks of  crc u32 | count u32 | segment u64 | row ids [count] int64 | records [count, B] u8
    place               segment << 40 | byte offset of a record

`crc` is the CRC-32 of all that follows it in its block. A segment is appended to by one process, until it is full
(`limit` bytes); bytes beyond the length that a manifest names do not count. Which records still hold: `live.py`.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from byrote.tables import disk

HEADER = np.dtype([("crc", "<u4"), ("count", "<u4"), ("segment", "<u8")])
OFFSET_BITS = 40
BLOCK_BYTES = 1 << 20  # about so many in a block


class Damaged(ValueError):
    """A segment is not what was written."""


class Segments:
    """Row ids and records are NumPy arrays; a record is `record_bytes` long."""

    def __init__(self, folder: Path, record_bytes: int, limit: int) -> None:
        self.folder, self.record_bytes, self.limit = folder, record_bytes, limit
        self.lengths: dict[int, int] = {}
        self.current = 0  # the one that is appended to; 0: none yet
        self.next = 1
        self._files: dict[int, int] = {}  # segment -> descriptor
        self._unsynced: set[int] = set()

    @property
    def block_rows(self) -> int:
        return max(1, min(BLOCK_BYTES, self.limit) // (self.record_bytes + 8))

    def open(self, segment: int, length: int) -> None:
        """To read the first `length` bytes of it."""
        try:
            self._files[segment] = os.open(self._path(segment), os.O_RDONLY)
        except FileNotFoundError:
            raise Damaged(f"{self._path(segment)} is missing") from None
        self.lengths[segment] = length

    def append(self, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
        """Write one block; the places of its records. It is not durable before `sync`."""
        if not self.current or self.lengths[self.current] >= self.limit:
            self._begin()
        segment, at = self.current, self.lengths[self.current]
        block = _block(segment, ids, records)
        disk.write_all(self._files[segment], block, at)
        self._unsynced.add(segment)
        self.lengths[segment] = at + len(block)
        return self._places(segment, at + HEADER.itemsize + 8 * len(ids), len(ids))

    def sync(self) -> None:
        for segment in sorted(self._unsynced):
            disk.sync_file(self._files[segment])
        self._unsynced.clear()

    def blocks(self, segment: int, check: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, places) of every block. Damaged where one is not what was written; with `check`, to the last bit."""
        file, length, at = self._files[segment], self.lengths[segment], 0
        while at < length:
            where = f"{self._path(segment)}: the block at byte {at} is damaged"
            head = os.pread(file, HEADER.itemsize, at)
            if len(head) < HEADER.itemsize:
                raise Damaged(where)
            header = np.frombuffer(head, HEADER)[0]
            count = int(header["count"])
            first = at + HEADER.itemsize + 8 * count
            end = first + count * self.record_bytes
            if end > length or int(header["segment"]) != segment:
                raise Damaged(where)
            body = os.pread(file, (end if check else first) - at - HEADER.itemsize, at + HEADER.itemsize)
            if check and zlib.crc32(body, zlib.crc32(head[4:])) != int(header["crc"]):
                raise Damaged(where)
            yield np.frombuffer(body[: 8 * count], np.int64), self._places(segment, first, count)
            at = end

    def read(self, places: np.ndarray, into: np.ndarray, records: np.ndarray) -> None:
        """Read the heads of records at ascending places into rows `into` of records."""
        segments = places >> OFFSET_BITS
        for segment in np.unique(segments).tolist():
            of = segments == segment
            offsets = places[of] & ((1 << OFFSET_BITS) - 1)
            bad = _kernel()(self._files[segment], offsets, into[of], records)
            if bad >= 0:
                raise Damaged(f"{self._path(segment)} ends before byte {offsets[bad] + records.shape[1]}")

    def trim(self, lengths: dict[int, int]) -> None:
        """Cut all segments of the folder to these lengths, and delete the others: a process that died left more."""
        for segment, path in self._found():
            self.next = max(self.next, segment + 1)
            if segment not in lengths:
                disk.delete(path)
            elif path.stat().st_size > lengths[segment]:
                disk.truncate(path, lengths[segment])

    def keep(self, needed: set[int]) -> list[int]:
        """Delete the others; which."""
        gone = [(segment, path) for segment, path in self._found() if segment not in needed]
        for segment, path in gone:
            disk.delete(path)
            if segment in self._files:
                os.close(self._files.pop(segment))
            self.lengths.pop(segment, None)
            self._unsynced.discard(segment)
        return [segment for segment, _ in gone]

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _begin(self) -> None:
        segment = self.next
        self._files[segment] = os.open(self._path(segment), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.current, self.next = segment, segment + 1
        self.lengths[segment] = 0

    def _places(self, segment: int, first: int, count: int) -> np.ndarray:
        """Of records that lie side by side from byte `first`."""
        return (segment << OFFSET_BITS) + first + np.arange(count) * self.record_bytes

    def _found(self) -> list[tuple[int, Path]]:
        return [(int(path.stem), path) for path in self.folder.glob("*.log")]

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment:06d}.log"


def segment_of(places: np.ndarray) -> np.ndarray:
    return places >> OFFSET_BITS


def _block(segment: int, ids: np.ndarray, records: np.ndarray) -> bytes:
    header = np.zeros(1, HEADER)
    header["count"], header["segment"] = len(ids), segment
    body = ids.astype("<i8").tobytes() + records.tobytes()
    header["crc"] = zlib.crc32(body, zlib.crc32(header.tobytes()[4:]))
    return bytes(header.tobytes() + body)


@functools.cache
def _kernel() -> Any:
    """pread(file, offsets [N], into [N], records [M, size]) -> index of the first short read, or -1."""
    from numba import njit, types

    pread = types.ExternalFunction("pread", types.int64(types.int32, types.uintp, types.uint64, types.int64))

    @njit("int64(int64, int64[::1], int64[::1], uint8[:, ::1])", cache=True, nogil=True)
    def read(file, offsets, into, records):  # type: ignore[no-untyped-def]
        size = records.shape[1]
        start = records.ctypes.data
        for i in range(len(offsets)):
            if pread(file, start + into[i] * size, size, offsets[i]) != size:
                return i
        return -1

    return read
