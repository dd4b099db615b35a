"""RowLog: a crash-safe store of changed rows beside an immutable table file.

    FOLDER/log.json                {format_version, num_rows, record_bytes, digest, base}
           manifest-000000012.json a committed generation (manifests.py): which parts of which segments are its content
           000003.log              a segment (segments.py): blocks of row ids and records, append-only
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

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

import numpy as np

from byrote.tables.files import reads
from byrote.tables.log import disk, manifests
from byrote.tables.log.index import DirtyRows, LiveRecords
from byrote.tables.log.segments import Damaged, Segments

FORMAT_VERSION = 1
HEADER = {"num_rows": int, "record_bytes": int, "digest": str, "base": str}
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
        self.folder, self.segment_bytes = folder, segment_bytes
        self.num_rows, self.record_bytes = int(header["num_rows"]), int(header["record_bytes"])
        self.digest, self.generation = header["digest"], 0
        self._segments = Segments(folder, self.record_bytes, segment_bytes)
        self._live = LiveRecords()
        self._dirty = DirtyRows(self.record_bytes, budget)
        self._fresh = 0  # records since the last commit
        self._lock: IO[bytes] | None = None
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
        log._lock = disk.lock(folder / "lock")
        disk.replace_json(folder / "log.json", {"format_version": FORMAT_VERSION, **header})
        log._write_manifest(generation)
        return log

    @classmethod
    def open(
        cls, folder: Path, generation: int | None = None, *, num_rows: int | None = None,
        record_bytes: int | None = None, digest: str | None = None, lock: bool = True,
        budget: int = 64 << 20, segment_bytes: int = 64 << 20,
    ) -> RowLog:  # fmt: skip
        """The state of a committed generation (the last unless given). Without `lock`, for reading."""
        missing = "no log; was the run folder moved or its tables/ deleted?"
        header = disk.read_json(folder / "log.json", FORMAT_VERSION, HEADER, missing)
        for name, wanted in (("num_rows", num_rows), ("record_bytes", record_bytes), ("digest", digest)):
            if wanted is not None and header[name] != wanted:
                raise ValueError(
                    f"{folder}: {name} is {header[name]}, asked for is {wanted}; it is another table's log"
                )
        log = cls(folder, header, budget, segment_bytes)
        if lock:
            log._lock = disk.lock(folder / "lock")
        known = log.generations()
        if not known or (generation is not None and generation not in known):
            raise ValueError(f"{folder}: no generation {generation}; committed are {known}")
        log.generation = known[-1] if generation is None else generation
        try:
            with log._saying_what_is_lost():
                for segment, length in manifests.read(folder, log.generation):
                    log._segments.open(segment, length)
                    for ids, places in log._segments.blocks(segment, check=True):
                        log._live.point(ids, places)
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
            self._lock = disk.lock(self.folder / "lock")
            if self.generation not in self.generations():
                raise ValueError(f"{self.folder}: generation {self.generation} was collected meanwhile; open it again")
            self._begin_writing()

    def __len__(self) -> int:
        """Rows that differ from the base."""
        return len(self.rows())

    @_alone
    def rows(self) -> np.ndarray:
        """Ids of the changed rows, ascending."""
        return np.union1d(self._live.rows(), self._dirty.items()[0])

    @_alone
    def holds(self, ids: np.ndarray) -> np.ndarray:
        """Bool [N]: the rows of ids [N] that differ from the base."""
        return self._dirty.holds(ids) | (self._live.places(ids) >= 0)

    @_alone
    def read(self, ids: np.ndarray, num_bytes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """found [N], and the first `num_bytes` (all unless given) of the records of ids [N]; zeros where not found."""
        size = self.record_bytes if num_bytes is None else num_bytes
        records = np.zeros((len(ids), size), np.uint8)
        found = self._dirty.read_into(ids, records)
        cold = np.flatnonzero(~found)
        places = self._live.places(ids[cold])
        cold, places = cold[places >= 0], places[places >= 0]
        found[cold] = True
        with self._saying_what_is_lost():
            records[cold] = self._segments.reads.read(places, size)
        return found, records

    @_alone
    def resident(self, ids: np.ndarray) -> bool:
        """Whether a sample of the records of ids [N] is in memory; reads of those that are not have begun."""
        return self._segments.reads.resident(self._written(ids), self.record_bytes)

    def warm(self, ids: np.ndarray) -> None:
        """Bring the records of ids [N] into memory. Who reads or writes meanwhile does not wait for it."""
        with self._busy:
            borrowed = self._segments.reads.borrow(self._written(ids))
        try:
            for file, places in borrowed:
                with contextlib.suppress(ValueError):  # a segment was cut: who reads the records says so
                    reads.warm(file, places, self.record_bytes)
        finally:
            for file, _ in borrowed:
                os.close(file)

    def _written(self, ids: np.ndarray) -> np.ndarray:
        """The places of those records that lie in segments and not in the buffer."""
        places = self._live.places(ids[~self._dirty.holds(ids)])
        return places[places >= 0]

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
        capacity = len(self._dirty.records)
        for at in range(0, len(ids), capacity):
            part = ids[at : at + capacity], records[at : at + capacity]
            if not self._dirty.put(*part):
                self._flush()
                self._dirty.put(*part)

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
        return manifests.generations(self.folder)

    @_alone
    def collect(self, keep: Iterable[int]) -> None:
        """Delete the generations that are not in `keep` (the present one stays), and segments that nothing needs."""
        self._check_writable()
        kept = {*keep, self.generation}
        manifests.delete(self.folder, [g for g in self.generations() if g not in kept])
        needed = manifests.needed(self.folder).keys() | self._live.segments() | {self._segments.current}
        for segment in self._segments.keep(needed):
            self._live.forget(segment)

    @property
    def next_generation(self) -> int:
        """What the present state can be committed as: the present one if nothing was written since."""
        return self.generations()[-1] + 1 if len(self._dirty) or self._fresh else self.generation

    def disk_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())

    @_alone
    def unlock(self) -> None:
        """Give the right to write back; what is committed stays readable here."""
        if self._lock is not None:
            self._lock.close()
        self._lock, self._segments.current = None, 0
        self._failed = self._failed or bool(len(self._dirty) or self._fresh)

    @_alone
    def close(self) -> None:
        """Give files and lock back. What was not committed is lost."""
        self._segments.close()
        if self._lock is not None:
            self._lock.close()
        self._lock, self._failed = None, True

    def _check_writable(self) -> None:
        if self._failed:
            raise ValueError(f"{self.folder}: the log was closed, or could not write; open it again")
        if self._lock is None:
            raise ValueError(f"{self.folder}: opened for reading; call lock() to write")

    def _begin_writing(self) -> None:
        """Delete what no generation needs: a process that died may have left it."""
        for path in self.folder.glob("*.tmp"):
            disk.delete(path)
        self._segments.trim(manifests.needed(self.folder))

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """After a write or fsync that failed nobody knows what is on the disk."""
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    @contextlib.contextmanager
    def _saying_what_is_lost(self) -> Iterator[None]:
        try:
            yield
        except Damaged as error:
            others = [g for g in self.generations() if g != self.generation]
            raise ValueError(
                f"{error}, which generation {self.generation} needs: restore the file, or open another generation "
                f"(there are {others})"
            ) from None

    def _flush(self) -> None:
        """Write the buffer to the current segment, and forget it."""
        ids, places = self._dirty.items()
        step = self._segments.block_rows
        for at in range(0, len(ids), step):
            self._append(ids[at : at + step], self._dirty.records[places[at : at + step]])
        self._fresh += len(ids)
        self._dirty.clear()

    def _append(self, ids: np.ndarray, records: np.ndarray) -> None:
        with self._failing():
            places = self._segments.append(ids, records)
        self._live.point(ids, places)

    def _compact(self) -> None:
        allowance = max(self._fresh, self.segment_bytes // self.record_bytes)
        for segment in [s for s in self._live.half_dead() if s != self._segments.current]:
            allowance -= self._live.alive[segment]
            if allowance < 0:
                break
            for ids, places in self._segments.blocks(segment, check=False):
                alive = ids[self._live.places(ids) == places]
                if len(alive):
                    self._append(alive, self.read(alive)[1])

    def _write_manifest(self, generation: int) -> None:
        with self._failing():
            self._segments.sync()
            lengths = self._segments.reads.lengths
            manifests.write(self.folder, generation, [(segment, lengths[segment]) for segment in self._live.segments()])
        self.generation, self._fresh = generation, 0
