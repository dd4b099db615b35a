"""Records out of open segments, at places in any order: like rows of a file (`rowsfile.py`), in one of two ways.

    positioned reads  `preads.py`: of unique places in ascending order, of all segments at once, by threads
    mappings          where `SAMPLE` records, spread over the batch, are all in memory: copies need no system call

A mapping of a file that ends early would be a SIGBUS, so the sizes are asked for before each batch, and a segment that
has grown since is mapped anew. Mapped or read, a record is the same bytes.

    place             segment << 40 | byte offset of a record
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import torch

from byrote.tables import gather, preads

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
            gather.copy(self._addresses(places), torch.from_numpy(records))
            return records
        unique, inverse = np.unique(places, return_inverse=True)
        read = np.empty((len(unique), size), np.uint8)
        preads.read([(file, len(at)) for file, at in self._by_file(unique)], unique & OFFSETS, read)
        gather.gather(torch.from_numpy(read), torch.from_numpy(inverse), torch.from_numpy(records))
        return records

    def resident(self, places: np.ndarray, size: int) -> bool:
        """Whether a sample of the records is in memory; reads of those that are not have begun."""
        sample = np.sort(places[:: max(1, -(-len(places) // SAMPLE))])
        return all([preads.resident(file, at & OFFSETS, size) for file, at in self._by_file(sample)])

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
