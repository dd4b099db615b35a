"""Segments: the append-only files of a log, and records out of them.

    FOLDER/000003.log   blocks of  crc u32 | count u32 | segment u64 | row ids [count] int64 | records [count, B] u8

`crc` is the CRC-32 of all that follows it in its block. A segment is appended to by one process, until it is full
(`limit` bytes); bytes beyond the length that a manifest names do not count. Which records still hold: `index.py`.

Records are read at places in any order, like rows of a file (`byrote.tables.files.rows`), in one of two ways:

    positioned reads  `files/reads.py`: of unique places in ascending order, of all segments at once, by threads
    mappings          where `SAMPLE` records, spread over the batch, are all in memory: copies need no system call

A mapping of a file that ends early would be a SIGBUS, so the sizes are asked for before each batch, and a segment that
has grown since is mapped anew. Mapped or read, a record is the same bytes.

    place             segment << 40 | byte offset of a record
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from byrote.tables.files import reads
from byrote.tables.log import disk
from byrote.tables.records import copy, gather

HEADER = np.dtype([("crc", "<u4"), ("count", "<u4"), ("segment", "<u8")])
BLOCK_BYTES = 1 << 20  # about so many in a block
OFFSET_BITS = 40
OFFSETS = (1 << OFFSET_BITS) - 1
SAMPLE = 32  # records


class Damaged(ValueError):
    """A segment is not what was written."""


def segment_of(places: np.ndarray) -> np.ndarray:
    return places >> OFFSET_BITS


class SegmentReads:
    """`files`: the descriptors of the segments that are open; `lengths`: so many bytes of each hold records."""

    def __init__(self) -> None:
        self.files: dict[int, int] = {}
        self.lengths: dict[int, int] = {}
        self._mapped: dict[int, np.ndarray] = {}

    def open(self, segment: int, file: int, length: int) -> None:
        if hasattr(os, "posix_fadvise"):  # without it a read of a record is one of many pages
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        self.files[segment], self.lengths[segment] = file, length

    def close(self, segment: int) -> None:
        self._mapped.pop(segment, None)
        os.close(self.files.pop(segment))
        del self.lengths[segment]

    def read(self, places: np.ndarray, size: int) -> np.ndarray:
        """uint8 [N, size]: the first `size` bytes of the records at places [N]. Damaged where a segment was cut."""
        records = np.empty((len(places), size), np.uint8)
        if not len(places):
            return records
        for segment in np.flatnonzero(np.bincount(segment_of(places))).tolist():
            found = os.fstat(self.files[segment]).st_size
            if found < self.lengths[segment]:
                raise Damaged(f"segment {segment} ends at byte {found}, before byte {self.lengths[segment]}")
        if self.resident(places, size):
            copy(self._addresses(places), torch.from_numpy(records))
            return records
        unique, inverse = np.unique(places, return_inverse=True)
        read = np.empty((len(unique), size), np.uint8)
        reads.read([(file, len(at)) for file, at in self._by_file(unique)], unique & OFFSETS, read)
        gather(torch.from_numpy(read), torch.from_numpy(inverse), torch.from_numpy(records))
        return records

    def resident(self, places: np.ndarray, size: int) -> bool:
        """Whether a sample of the records is in memory; reads of those that are not have begun."""
        sample = np.sort(places[:: max(1, -(-len(places) // SAMPLE))])
        return all([reads.resident(file, at & OFFSETS, size) for file, at in self._by_file(sample)])

    def borrow(self, places: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(descriptor, ascending offsets) of unique places; the descriptors are the caller's, who closes them."""
        return [(os.dup(file), at & OFFSETS) for file, at in self._by_file(np.unique(places))]

    def _by_file(self, places: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(descriptor, places in it) of ascending places."""
        if not len(places):
            return []
        segments, begins = np.unique(segment_of(places), return_index=True)
        parts = np.split(places, begins[1:])
        return [(self.files[segment], part) for segment, part in zip(segments.tolist(), parts, strict=True)]

    def _addresses(self, places: np.ndarray) -> torch.Tensor:
        segments = segment_of(places)
        begins = np.zeros(int(segments.max()) + 1, np.int64)
        for segment in np.flatnonzero(np.bincount(segments)).tolist():
            begins[segment] = self._mapping(segment).ctypes.data
        return torch.from_numpy(begins[segments] + (places & OFFSETS))

    def _mapping(self, segment: int) -> np.ndarray:
        length = self.lengths[segment]
        if segment not in self._mapped or len(self._mapped[segment]) < length:
            mapped = mmap.mmap(self.files[segment], length, prot=mmap.PROT_READ)
            if hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_RANDOM)
            self._mapped[segment] = np.frombuffer(mapped, np.uint8)
        return self._mapped[segment]


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
