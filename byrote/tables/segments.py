"""Segments: the append-only files of a log. How records are read, and what a place is: `segment_reads.py`.

    FOLDER/000003.log   blocks of  crc u32 | count u32 | segment u64 | row ids [count] int64 | records [count, B] u8

`crc` is the CRC-32 of all that follows it in its block. A segment is appended to by one process, until it is full
(`limit` bytes); bytes beyond the length that a manifest names do not count. Which records still hold: `live.py`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from byrote.tables import disk
from byrote.tables.segment_reads import OFFSET_BITS, Damaged, SegmentReads

HEADER = np.dtype([("crc", "<u4"), ("count", "<u4"), ("segment", "<u8")])
BLOCK_BYTES = 1 << 20  # about so many in a block


class Segments:
    """Row ids and records are NumPy arrays; a record is `record_bytes` long."""

    def __init__(self, folder: Path, record_bytes: int, limit: int) -> None:
        self.folder, self.record_bytes, self.limit = folder, record_bytes, limit
        self.reads = SegmentReads()
        self.current = 0  # the one that is appended to; 0: none yet
        self.next = 1
        self._unsynced: set[int] = set()

    @property
    def block_rows(self) -> int:
        return max(1, min(BLOCK_BYTES, self.limit) // (self.record_bytes + 8))

    def open(self, segment: int, length: int) -> None:
        """To read the first `length` bytes of it."""
        try:
            file = os.open(self._path(segment), os.O_RDONLY)
        except FileNotFoundError:
            raise Damaged(f"{self._path(segment)} is missing") from None
        self.reads.open(segment, file, length)

    def append(self, ids: np.ndarray, records: np.ndarray) -> np.ndarray:
        """Write one block; the places of its records. It is not durable before `sync`."""
        if not self.current or self.reads.lengths[self.current] >= self.limit:
            self._begin()
        segment, at = self.current, self.reads.lengths[self.current]
        block = _block(segment, ids, records)
        disk.write_all(self.reads.files[segment], block, at)
        self._unsynced.add(segment)
        self.reads.lengths[segment] = at + len(block)
        return self._places(segment, at + HEADER.itemsize + 8 * len(ids), len(ids))

    def sync(self) -> None:
        for segment in sorted(self._unsynced):
            disk.sync_file(self.reads.files[segment])
        self._unsynced.clear()

    def blocks(self, segment: int, check: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, places) of every block. Damaged where one is not what was written; with `check`, to the last bit."""
        file, length, at = self.reads.files[segment], self.reads.lengths[segment], 0
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
            if segment in self.reads.files:
                self.reads.close(segment)
            self._unsynced.discard(segment)
        return [segment for segment, _ in gone]

    def close(self) -> None:
        for segment in list(self.reads.files):
            self.reads.close(segment)

    def _begin(self) -> None:
        segment = self.next
        self.reads.open(segment, os.open(self._path(segment), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), 0)
        self.current, self.next = segment, segment + 1

    def _places(self, segment: int, first: int, count: int) -> np.ndarray:
        """Of records that lie side by side from byte `first`."""
        return (segment << OFFSET_BITS) + first + np.arange(count) * self.record_bytes

    def _found(self) -> list[tuple[int, Path]]:
        return [(int(path.stem), path) for path in self.folder.glob("*.log")]

    def _path(self, segment: int) -> Path:
        return self.folder / f"{segment:06d}.log"


def _block(segment: int, ids: np.ndarray, records: np.ndarray) -> bytes:
    header = np.zeros(1, HEADER)
    header["count"], header["segment"] = len(ids), segment
    body = ids.astype("<i8").tobytes() + records.tobytes()
    header["crc"] = zlib.crc32(body, zlib.crc32(header.tobytes()[4:]))
    return bytes(header.tobytes() + body)
