"""Reads that begin at the top of a forward and are waited for at the layer.

    begin(table, rows, times) -> Reading, or None where the layer had better read by itself
    reading.take()            -> what was read, once; None afterwards, and where the table was written meanwhile

On a CPU a read begins early if it would wait for a device: if the table can tell that rows are cold
(`byrote.tables.table`). What lies in memory is read in place, at the layer, as a copy that a thread would only delay.
Sharded tables and overlays are always read in place: ranks must exchange rows in one order, and an overlay cannot be
read while it is written.

On a GPU every table that counts its writes is read early, on a stream of its own, for which the layer's stream waits.
What the GPU reads itself (`asynchronous` tables) is queued there at once, and not timed. Else a thread waits for the
row ids, and rows go back from pinned memory. So no layer stops the launching of kernels to ask for row ids.

What a layer gets is what it would have read at that moment: a read that a write has overtaken is thrown away, and made
again at the layer. The first wait takes the values, so that they are not kept for the backward; a block that is
recomputed reads anew, and gets the same, because rows change in `optimizer.step` only.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from byrote.tables.table import Table

THREADS = 2  # tables that are read at once; each read has threads of its own (`byrote.tables.files.reads`)


@dataclass(eq=False)
class Times:
    """Seconds that reads of one table took, and for how many of them a forward stood still."""

    read: float = 0.0
    waited: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, read: float, waited: float) -> None:
        """A read that was waited for longer than it took stood in a queue: it hid nothing."""
        with self._lock:
            self.read += read
            self.waited += min(read, waited)

    @property
    def hidden(self) -> float:
        return 1 - self.waited / self.read if self.read else 0.0


class Reading:
    """One read under way. It is kept by the ticket alone: one that nobody waits for goes with its ticket."""

    def __init__(self, table: Table, rows: Tensor, times: Times) -> None:
        self.table, self.rows, self.times = table, rows, times
        self._writes = table.writes
        self._job: Future[Any] | None
        if not rows.is_cuda:
            self._job = _pool(os.getpid()).submit(_read, table, rows)
            return
        ready = torch.cuda.current_stream(rows.device).record_event()
        if table.asynchronous:
            self._job = Future()
            self._job.set_result(_queue_on_gpu(table, rows, ready))
        else:
            self._job = _pool(os.getpid()).submit(_read_for_gpu, table, rows, ready)

    def take(self) -> Tensor | None:
        """Raises what the read has raised."""
        job, self._job = self._job, None
        if job is None:
            return None
        began = time.perf_counter()
        values, seconds, done = job.result()
        self.times.add(seconds, time.perf_counter() - began)
        if done is not None:
            stream = torch.cuda.current_stream(values.device)
            stream.wait_event(done)
            values.record_stream(stream)
        return values if self.table.writes == self._writes else None


def begin(table: Table, rows: Tensor, times: Times) -> Reading | None:
    if type(rows) is not Tensor or not rows.numel() or not table.apart:
        return None
    if rows.is_cuda or (rows.device.type == "cpu" and table.cold(rows)):
        return Reading(table, rows, times)
    return None


def warm(table: Table, rows: Tensor, times: Times) -> None:
    """Bring rows into memory, on the caller's thread, long before they are read."""
    if table.cold(rows):
        began = time.perf_counter()
        table.warm(rows)
        times.add(time.perf_counter() - began, 0.0)


def _read(table: Table, rows: Tensor) -> tuple[Tensor, float, None]:
    began = time.perf_counter()
    values = table.read(rows)
    return values, time.perf_counter() - began, None


def _read_for_gpu(table: Table, rows: Tensor, ready: Any) -> tuple[Tensor, float, Any]:
    """The event tells when the values are there, on the device of the rows."""
    with torch.cuda.device(rows.device), torch.cuda.stream(_stream(rows.device)) as _:
        stream = torch.cuda.current_stream()
        stream.wait_event(ready)
        ids = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
        stream.synchronize()
        began = time.perf_counter()
        staged = table.read(ids).pin_memory()
        values = staged.to(rows.device, non_blocking=True)
        return values, time.perf_counter() - began, stream.record_event()


def _queue_on_gpu(table: Table, rows: Tensor, ready: Any) -> tuple[Tensor, float, Any]:
    stream = _stream(rows.device)
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        values = table.read(rows)
        rows.record_stream(stream)
        return values, 0.0, stream.record_event()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Of this process: a child that was forked has none of its parent's threads."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="byrote-prefetch")


@cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
