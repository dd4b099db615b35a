"""RowLog: a crash-safe store of changed rows beside an immutable table file.

    FOLDER/log.json                {format_version, num_rows, record_bytes, digest, base}
           manifest-000000012.json a committed generation: {..., segments: [[number, bytes], ...], crc}
           000003.log              a segment, append-only: blocks of  crc u32 | count u32 | segment u64 |
                                   row ids [count] int64 | records [count, record_bytes] u8
           lock                    flocked by the one process that writes

Of equal row ids the last one, in the order of segments and blocks, holds. `write` fills a buffer of `budget` bytes;
when it is full it is written behind, without fsync. `commit` writes the rest, fsyncs the segments, and renames a
manifest into place. Whatever happens at any point, opening gives exactly a committed generation: bytes beyond a
manifest's lengths do not count, and no segment is appended to by two processes, since `lock` begins a new one.

The base and the log live apart: a row that the log does not hold is the base's. Memory is the buffer and 22 to 32
bytes for each row that was ever changed. A commit costs what was written since the last one: a segment of which less
than half is alive is copied on, but no more than as many records as were written (or one segment), deadest first.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from byrote.tables.rowmap import RowMap

FORMAT_VERSION = 1
HEADER = np.dtype([("crc", "<u4"), ("count", "<u4"), ("segment", "<u8")])
OFFSET_BITS = 40  # of a place: segment << 40 | byte offset of the record
BLOCK_BYTES = 1 << 20  # about so many in a block
P = ParamSpec("P")
R = TypeVar("R")


def _alone(method: Callable[P, R]) -> Callable[P, R]:
    """One at a time: rows may be read on another thread than they are written on."""

    @functools.wraps(method)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with args[0]._busy:  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return locked


class RowLog:
    """Made by `create` or `open`. Row ids and records are NumPy arrays; a record is `record_bytes` long."""

    def __init__(self, folder: Path, header: dict[str, Any], budget: int, segment_bytes: int) -> None:
        self.folder, self.budget, self.segment_bytes = folder, budget, segment_bytes
        self.num_rows, self.record_bytes = int(header["num_rows"]), int(header["record_bytes"])
        self.digest, self.generation = header["digest"], 0
        self._index = RowMap()  # row -> place on disk
        self._dirty = RowMap()  # row -> place in the buffer
        self._buffer = np.empty((max(1, budget // (self.record_bytes + 32)), self.record_bytes), np.uint8)
        self._files: dict[int, int] = {}  # segment -> descriptor
        self._lengths: dict[int, int] = {}
        self._alive: dict[int, int] = {}  # records that the index points to
        self._written: dict[int, int] = {}  # records in all
        self._current = 0  # the segment that is appended to; 0: none yet
        self._next = 1
        self._unsynced: set[int] = set()
        self._fresh = 0  # records since the last commit
        self._lock: int | None = None
        self._failed = False
        self._busy = threading.RLock()

    @classmethod
    def create(
        cls, folder: Path, *, num_rows: int, record_bytes: int, digest: str, base: str = "", generation: int = 0,
        budget: int = 64 << 20, segment_bytes: int = 64 << 20,
    ) -> RowLog:  # fmt: skip
        """An empty log, with `generation` committed: that of the base, in which no row is changed."""
        if (folder / "log.json").exists():
            raise ValueError(f"{folder} holds a log already; open it, or choose another folder")
        if num_rows < 1 or record_bytes < 1 or generation < 0:
            raise ValueError(f"a log needs rows and bytes, got {num_rows=}, {record_bytes=}, {generation=}")
        folder.mkdir(parents=True, exist_ok=True)
        header = {"num_rows": num_rows, "record_bytes": record_bytes, "digest": digest, "base": base}
        log = cls(folder, header, budget, segment_bytes)
        log._take_lock()
        _replace(folder / "log.json", {"format_version": FORMAT_VERSION, **header})
        log._write_manifest(generation)
        return log

    @classmethod
    def open(
        cls, folder: Path, generation: int | None = None, *, num_rows: int | None = None,
        record_bytes: int | None = None, digest: str | None = None, lock: bool = True,
        budget: int = 64 << 20, segment_bytes: int = 64 << 20,
    ) -> RowLog:  # fmt: skip
        """The state of a committed generation (the last unless given). Without `lock`, for reading."""
        header = _read_json(folder / "log.json", "no log; was the run folder moved or its tables/ deleted?")
        for name, wanted in (("num_rows", num_rows), ("record_bytes", record_bytes), ("digest", digest)):
            if wanted is not None and header[name] != wanted:
                raise ValueError(
                    f"{folder}: {name} is {header[name]}, asked for is {wanted}; it is another table's log"
                )
        log = cls(folder, header, budget, segment_bytes)
        if lock:
            log._take_lock()
        known = log.generations()
        if not known or (generation is not None and generation not in known):
            raise ValueError(f"{folder}: no generation {generation}; committed are {known}")
        log.generation = known[-1] if generation is None else generation
        try:
            for segment, length in log._manifest(log.generation):
                log._scan(segment, length)
            if lock:
                log._begin_writing()
        except BaseException:
            log.close()
            raise
        return log

    @_alone
    def lock(self) -> None:
        """Take the right to write, for a log that was opened without."""
        if self._lock is None:
            self._take_lock()
            if self.generation not in self.generations():
                raise ValueError(f"{self.folder}: generation {self.generation} was collected meanwhile; open it again")
            self._begin_writing()

    def __len__(self) -> int:
        """Rows that differ from the base."""
        return len(self.rows())

    @_alone
    def rows(self) -> np.ndarray:
        """Ids of the changed rows, ascending."""
        return np.union1d(self._index.items()[0], self._dirty.items()[0])

    @_alone
    def holds(self, ids: np.ndarray) -> np.ndarray:
        """Bool [N]: the rows of ids [N] that differ from the base."""
        return (self._dirty.get(ids) >= 0) | (self._index.get(ids) >= 0)

    @_alone
    def read(self, ids: np.ndarray, num_bytes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """found [N], and the first `num_bytes` (all unless given) of the records of ids [N]; zeros where not found."""
        size = self.record_bytes if num_bytes is None else num_bytes
        records = np.zeros((len(ids), size), np.uint8)
        dirty = self._dirty.get(ids)
        found = dirty >= 0
        records[found] = self._buffer[dirty[found], :size]
        cold = np.flatnonzero(~found)
        places = self._index.get(ids[cold])
        cold, places = cold[places >= 0], places[places >= 0]
        found[cold] = True
        order = np.argsort(places, kind="stable")
        self._pread(places[order], cold[order], records)
        return found, records

    @_alone
    def write(self, ids: np.ndarray, records: np.ndarray) -> None:
        """Set the records [U, B] of unique ids [U]."""
        self._check_writable()
        if records.shape != (len(ids), self.record_bytes) or records.dtype != np.uint8:
            raise ValueError(
                f"records must be uint8 {[len(ids), self.record_bytes]}, got {records.dtype} {records.shape}"
            )
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_rows):
            raise ValueError(f"row ids {ids.min()}..{ids.max()} leave the table of {self.num_rows} rows")
        capacity = len(self._buffer)
        for at in range(0, len(ids), capacity):
            part, bytes_ = ids[at : at + capacity], records[at : at + capacity]
            places = self._dirty.get(part)
            if len(self._dirty) + int((places < 0).sum()) > capacity:
                self._flush()
                places = self._dirty.get(part)
            new = places < 0
            places[new] = len(self._dirty) + np.arange(int(new.sum()))
            self._buffer[places] = bytes_
            self._dirty.put(part, places)

    @_alone
    def commit(self, generation: int) -> None:
        """Make the present state durable as `generation`. When it returns, it survives; before, the last one does."""
        self._check_writable()
        if generation == self.generation and not len(self._dirty) and not self._fresh:
            return
        if generation in self.generations():
            raise ValueError(f"{self.folder}: generation {generation} is committed already; collect it first")
        self._flush()
        self._compact()
        self._write_manifest(generation)

    def generations(self) -> list[int]:
        """The committed ones, ascending."""
        matches = (re.fullmatch(r"manifest-(\d+)\.json", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    @_alone
    def collect(self, keep: Iterable[int]) -> None:
        """Delete the generations that are not in `keep` (the present one stays), and segments that nothing needs."""
        self._check_writable()
        kept = {*keep, self.generation}
        dropped = [generation for generation in self.generations() if generation not in kept]
        for generation in dropped:
            os.unlink(self._manifest_path(generation))
        if dropped:
            _sync_folder(self.folder)  # a manifest must never outlive its segments
        needed = self._committed_lengths().keys() | {s for s, n in self._alive.items() if n} | {self._current}
        for path in self.folder.glob("*.log"):
            if (segment := int(path.stem)) not in needed:
                os.unlink(path)
                self._forget(segment)

    def disk_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())

    @_alone
    def unlock(self) -> None:
        """Give the right to write back; what is committed stays readable here."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock, self._current = None, 0
        self._failed = self._failed or bool(len(self._dirty) or self._fresh)

    @_alone
    def close(self) -> None:
        """Give files and lock back. What was not committed is lost."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        if self._lock is not None:
            os.close(self._lock)
        self._lock, self._failed = None, True

    def _check_writable(self) -> None:
        if self._failed:
            raise ValueError(f"{self.folder}: the log was closed, or could not write; open it again")
        if self._lock is None:
            raise ValueError(f"{self.folder}: opened for reading; call lock() to write")

    def _take_lock(self) -> None:
        file = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            raise ValueError(f"{self.folder} is open for writing in another process; a log has one writer") from None
        self._lock = file

    def _begin_writing(self) -> None:
        """Delete what no generation needs: a process that died may have left it."""
        for path in self.folder.glob("*.tmp"):
            os.unlink(path)
        lengths = self._committed_lengths()
        for path in self.folder.glob("*.log"):
            segment = int(path.stem)
            self._next = max(self._next, segment + 1)
            if segment not in lengths:
                os.unlink(path)
            elif path.stat().st_size > lengths[segment]:
                os.truncate(path, lengths[segment])

    def _committed_lengths(self) -> dict[int, int]:
        lengths: dict[int, int] = {}
        for generation in self.generations():
            for segment, length in self._manifest(generation):
                lengths[segment] = max(length, lengths.get(segment, 0))
        return lengths

    def _flush(self) -> None:
        """Write the buffer to the current segment, and forget it."""
        ids, places = self._dirty.items()
        step = self._block_rows()
        for at in range(0, len(ids), step):
            self._append(ids[at : at + step], self._buffer[places[at : at + step]])
        self._fresh += len(ids)
        self._dirty = RowMap()

    def _append(self, ids: np.ndarray, records: np.ndarray) -> None:
        try:
            if not self._current or self._lengths[self._current] >= self.segment_bytes:
                self._begin_segment()
            segment = self._current
            block = _block(segment, ids, records)
            at = self._lengths[segment]
            _write_all(self._files[segment], block, at)
        except BaseException:
            self._failed = True
            raise
        self._unsynced.add(segment)
        self._lengths[segment] = at + len(block)
        self._point(segment, ids, at + HEADER.itemsize + 8 * len(ids))

    def _begin_segment(self) -> None:
        segment = self._next
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._files[segment] = os.open(self._segment_path(segment), flags, 0o644)
        self._current, self._next = segment, segment + 1
        self._lengths[segment] = self._alive[segment] = self._written[segment] = 0

    def _point(self, segment: int, ids: np.ndarray, offset: int) -> None:
        """Records of ids lie side by side from `offset` of the segment."""
        before = self._index.get(ids)
        segments, counts = np.unique(before[before >= 0] >> OFFSET_BITS, return_counts=True)
        for old, count in zip(segments.tolist(), counts.tolist(), strict=True):
            self._alive[old] -= count
        self._index.put(ids, (segment << OFFSET_BITS) + offset + np.arange(len(ids)) * self.record_bytes)
        self._alive[segment] = self._alive.get(segment, 0) + len(ids)
        self._written[segment] = self._written.get(segment, 0) + len(ids)

    def _compact(self) -> None:
        allowance = max(self._fresh, self.segment_bytes // self.record_bytes)
        sealed = [s for s, alive in self._alive.items() if s != self._current and 0 < 2 * alive < self._written[s]]
        for segment in sorted(sealed, key=lambda s: self._alive[s] / self._written[s]):
            allowance -= self._alive[segment]
            if allowance < 0:
                break
            for ids, first, _ in self._blocks(segment, self._lengths[segment], check=False):
                places = (segment << OFFSET_BITS) + first + np.arange(len(ids)) * self.record_bytes
                alive = ids[self._index.get(ids) == places]
                if len(alive):
                    self._append(alive, self.read(alive)[1])

    def _write_manifest(self, generation: int) -> None:
        try:
            for segment in sorted(self._unsynced):
                os.fsync(self._files[segment])
            content = {"format_version": FORMAT_VERSION, "generation": generation}
            segments = sorted([s, self._lengths[s]] for s, alive in self._alive.items() if alive)
            content["segments"] = segments  # type: ignore[assignment]
            _replace(self._manifest_path(generation), {**content, "crc": _crc(content)})
        except BaseException:
            self._failed = True  # after a failed fsync nobody knows what is on the disk
            raise
        self._unsynced.clear()
        self.generation, self._fresh = generation, 0

    def _manifest(self, generation: int) -> list[tuple[int, int]]:
        path = self._manifest_path(generation)
        content = _read_json(path, "no such generation")
        if content.pop("crc", None) != _crc(content):
            raise ValueError(f"{path} is damaged; open another generation of {self.generations()}")
        return [(segment, length) for segment, length in content["segments"]]

    def _manifest_path(self, generation: int) -> Path:
        return self.folder / f"manifest-{generation:09d}.json"

    def _segment_path(self, segment: int) -> Path:
        return self.folder / f"{segment:06d}.log"

    def _scan(self, segment: int, length: int) -> None:
        """Read a segment, check it, and point the index to its records."""
        path = self._segment_path(segment)
        try:
            self._files[segment] = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing, which {self._lost()}") from None
        self._lengths[segment] = length
        for ids, first, _ in self._blocks(segment, length, check=True):
            self._point(segment, ids, first)

    def _lost(self) -> str:
        others = [g for g in self.generations() if g != self.generation]
        return f"generation {self.generation} needs: restore the file, or open another generation (there are {others})"

    def _blocks(self, segment: int, length: int, check: bool) -> Iterator[tuple[np.ndarray, int, int]]:
        """(ids, offset of the first record, end) of every block. ValueError where one is not what was written."""
        file, at = self._files[segment], 0
        while at < length:
            where = f"{self._segment_path(segment)}: the block at byte {at} is damaged, which {self._lost()}"
            head = os.pread(file, HEADER.itemsize, at)
            if len(head) < HEADER.itemsize:
                raise ValueError(where)
            header = np.frombuffer(head, HEADER)[0]
            count = int(header["count"])
            first = at + HEADER.itemsize + 8 * count
            end = first + count * self.record_bytes
            if end > length or int(header["segment"]) != segment:
                raise ValueError(where)
            body = os.pread(file, (end if check else first) - at - HEADER.itemsize, at + HEADER.itemsize)
            if check and zlib.crc32(body, zlib.crc32(head[4:])) != int(header["crc"]):
                raise ValueError(where)
            yield np.frombuffer(body[: 8 * count], np.int64), first, end
            at = end

    def _pread(self, places: np.ndarray, into: np.ndarray, records: np.ndarray) -> None:
        """Read the heads of records at ascending places into rows `into` of records."""
        segments = places >> OFFSET_BITS
        for segment in np.unique(segments).tolist():
            of = segments == segment
            offsets = places[of] & ((1 << OFFSET_BITS) - 1)
            bad = _kernel()(self._files[segment], offsets, into[of], records)
            if bad >= 0:
                path = self._segment_path(segment)
                raise ValueError(f"{path} ends before byte {offsets[bad] + records.shape[1]}, which {self._lost()}")

    def _forget(self, segment: int) -> None:
        if segment in self._files:
            os.close(self._files.pop(segment))
        for facts in (self._lengths, self._alive, self._written):
            facts.pop(segment, None)
        self._unsynced.discard(segment)

    def _block_rows(self) -> int:
        return max(1, min(BLOCK_BYTES, self.segment_bytes) // (self.record_bytes + 8))


def _block(segment: int, ids: np.ndarray, records: np.ndarray) -> bytes:
    header = np.zeros(1, HEADER)
    header["count"], header["segment"] = len(ids), segment
    body = ids.astype("<i8").tobytes() + records.tobytes()
    header["crc"] = zlib.crc32(body, zlib.crc32(header.tobytes()[4:]))
    return bytes(header.tobytes() + body)


def _write_all(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _replace(path: Path, content: dict[str, Any]) -> None:
    """Write a small file so that it is there whole or not at all, and stays."""
    temporary = path.with_name(path.name + ".tmp")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _write_all(file, json.dumps(content).encode(), 0)
        os.fsync(file)
    finally:
        os.close(file)
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: {hint}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} is damaged, or of another format_version than {FORMAT_VERSION}")
    return content


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
