"""Reading rows inside the autograd graph without a gradient the size of a table.

    gather(anchor, rows, handle)       -> values [..., W]      forward; `anchor` is what autograd sees of the table
    accumulate(gradient, rows, handle) -> zeros [1]            its backward; the gradient of the anchor

The row gradients leave the graph here: they wait in the table's `Pending` until an optimizer's step consumes them.
There is no double backward. A `handle` is a plain integer, so that the two ops can stand in a compiled graph. Rows
that were asked for ahead of time (`prefetch.py`) are known by the tensor of their ids; `gather` then waits for them.

What becomes of gradients between backward and step becomes of row gradients. When a backward reaches the anchor, a hook
keeps what arrived and sets the anchor's gradient to `MARK`, a number so small that no norm counts it. Where that is
found again, at the next backward or at the step, it tells what was done to all gradients meanwhile:

    MARK        nothing                        s * MARK      they were scaled by s, by hand or by a clip of their norm
    none, 0     they were dropped or zeroed    NaN           they are not finite (`accumulate` tells of those of rows)

A backward that never reaches the anchor (`torch.autograd.grad`, a probe) leaves nothing behind. What is not a factor,
noise or a norm of its own for each parameter, is refused; clipping each value by its size is not seen.
"""

from __future__ import annotations

import copy
import itertools
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from byrote.memory.prefetch import Reading, Times, begin, warm
from byrote.tables.records import sum_rows
from byrote.tables.table import Table

MARK = 2.0**-80
LARGEST = 2.0**40  # factor that is believed: what adds noise to gradients leaves another size behind

Part = tuple[Tensor, Tensor, Tensor]  # unique row ids [U], sums [U, W], which of these are not all zero [U]


@dataclass(eq=False)
class Pending:
    """Row gradients that wait for the optimizer: one float32 sum a row, summed in a fixed order.

    `anchored`: whether an anchor's hook calls `claim`. What arrives in a backward is then kept if that reaches the
    anchor; else it is kept at once.
    """

    parts: list[Part] = field(default_factory=list)
    anchored: bool = False
    _arrived: list[Part] = field(default_factory=list)
    _bound: int = 0  # rows that the parts may hold before they are summed

    def add(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Add row gradients [M, W] of row ids [M] (duplicates allowed); the sums [U, W] of these."""
        part = sum_rows(rows, gradient.float())
        if self.anchored:
            self._arrived.append(part)
            _at_the_end_of_backward(lambda: self._discard(part))
        else:
            self._keep(part)
        return part[1]

    def claim(self, anchor: Tensor) -> None:
        """Keep what arrived in the backward that has now reached the anchor."""
        if not self._arrived:
            return
        self.follow(anchor)
        arrived, self._arrived = self._arrived, []
        for part in arrived:
            self._keep(part)

    def follow(self, anchor: Tensor) -> None:
        """Do to the sums what was done to the anchor's gradient since it was marked, and mark it again.

        RuntimeError if that was something else than a factor.
        """
        if not self.anchored:
            if anchor.grad is None:
                self.drop()
            return
        factor = _factor(anchor.grad) if self.parts else 1.0
        if not factor:
            self.parts.clear()
        elif factor != 1:
            self.parts = [(rows, _scaled(sums, factor), touched) for rows, sums, touched in self.parts]
        if anchor.grad is not None:
            anchor.grad.mul_(0).add_(_mark(anchor.grad.dtype))  # what is not finite becomes NaN

    def drop(self) -> None:
        self.parts.clear()
        self._arrived.clear()

    def sum(self) -> tuple[Tensor, Tensor] | None:
        """Unique ascending row ids [U] and their summed gradients [U, W]; None if there are none.

        A row whose gradient is zero is not among them. It was read where nothing is learned (padding, the last token
        of a row, a masked label), and by the rule a touch ages its moments: padding would leave a trace in training.
        """
        if not self.parts:
            return None
        self._merge()
        rows, gradient, touched = self.parts[0]
        if not touched.any():
            return None
        return (rows, gradient) if touched.all() else (rows[touched], gradient[touched])

    def take(self) -> tuple[Tensor, Tensor] | None:
        """What `sum` returns, and forget it."""
        taken = self.sum()
        self.drop()
        return taken

    def _keep(self, part: Part) -> None:
        """Parts are summed when they hold more than twice what they did as one: memory is bounded, at little cost."""
        if not self.parts:
            self._bound = 2 * len(part[0])
        self.parts.append(part)
        if sum(len(rows) for rows, _, _ in self.parts) > self._bound:
            self._merge()

    def _merge(self) -> None:
        if len(self.parts) > 1:
            rows, gradient, _ = (torch.cat(column) for column in zip(*self.parts, strict=True))
            self.parts = [sum_rows(rows, gradient)]
        self._bound = 2 * len(self.parts[0][0])

    def _discard(self, part: Part) -> None:
        self._arrived = [other for other in self._arrived if other is not part]


def _at_the_end_of_backward(call: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(call)  # type: ignore[attr-defined]


def _mark(dtype: torch.dtype) -> float:
    return max(MARK, torch.finfo(dtype).tiny)


def _factor(gradient: Tensor | None) -> float:
    """By what the marked gradient of an anchor was multiplied; 0 where there is none any more."""
    if gradient is None:
        return 0.0
    factor = float(gradient) / _mark(gradient.dtype)
    if abs(factor - 1) <= 4 * torch.finfo(gradient.dtype).eps:  # the mean over ranks rounds
        return 1.0
    if abs(factor) > LARGEST:
        raise RuntimeError(
            f"the gradient of a table's anchor is {float(gradient):.3g}: something other than a factor was done to all "
            "gradients, which row gradients cannot follow. Leave the parameters named *.anchor out of it"
        )
    return factor


def _scaled(sums: Tensor, factor: float) -> Tensor:
    """NaN tells of sums that are not finite, and leaves these to be counted; or all gradients were made NaN."""
    return sums if factor != factor and not sums.isfinite().all() else sums * factor


@dataclass(eq=False)
class Lookup:
    """One table as the graph sees it: a handle, the table, the gradients that wait for it, the reads under way."""

    table: Table
    pending: Pending = field(default_factory=Pending)
    times: Times = field(default_factory=Times)
    handle: int = field(init=False)

    def __post_init__(self) -> None:
        self.handle = next(_handles)
        _lookups[self.handle] = self
        # By the address of the row ids, which a reading keeps: no other tensor can have it meanwhile.
        self._readings: weakref.WeakValueDictionary[int, Reading] = weakref.WeakValueDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Lookup:
        return Lookup(copy.deepcopy(self.table, memo))  # nothing waits for it yet

    def begin(self, rows: Tensor) -> Reading | None:
        """Begin to read rows [...], if that is better done ahead of time."""
        reading = begin(self.table, rows, self.times)
        if reading is not None:
            self._readings[rows.data_ptr()] = reading
        return reading

    def read(self, rows: Tensor) -> Tensor:
        """Rows [..., W] as they are now, out of a read that was begun if there is one."""
        reading = self._readings.get(rows.data_ptr())
        if reading is not None and reading.rows.shape == rows.shape and reading.rows.stride() == rows.stride():
            values = reading.take()
            if values is not None:
                return values
        began = time.perf_counter()
        values = self.table.read(rows)
        took = time.perf_counter() - began
        self.times.add(took, took)
        return values

    def warm(self, rows: Tensor) -> None:
        """Bring rows into memory, to be read later."""
        warm(self.table, rows.cpu(), self.times)

    def stats(self) -> dict[str, Any]:
        """Those of the table, and what its reads took: `hidden` is the share of that for which no forward waited."""
        times = {"read_seconds": self.times.read, "waited_seconds": self.times.waited, "hidden": self.times.hidden}
        return {**self.table.stats(), **times}


_handles = itertools.count(1)
_lookups: weakref.WeakValueDictionary[int, Lookup] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Ticket:
    """The rows that one forward needs of one table: row ids [B, T, C] for C columns, and the way to them.

    It is made at the top of a forward, handed down as an argument and kept nowhere: two forwards before one
    backward, or a recomputed block, each hold their own row ids.
    """

    rows: Tensor
    anchor: Tensor
    lookup: Lookup
    reading: Reading | None = None  # under way since the top of the forward

    def wait(self) -> Tensor:
        """The memory of every token, [B, T, C * W]: its C rows side by side. May be called again."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return gather(self.anchor, self.rows, self.lookup.handle).flatten(-2)
        return self.lookup.read(self.rows).flatten(-2)


@torch.library.custom_op("byrote::gather", mutates_args=())
def gather(anchor: Tensor, rows: Tensor, handle: int) -> Tensor:
    """Rows [..., W] of row ids [...] in float32. `anchor` [1] carries no value, only the graph."""
    return _lookups[handle].read(rows)


@gather.register_fake
def _(anchor: Tensor, rows: Tensor, handle: int) -> Tensor:
    # int: a compiler that has met two tables hands over a symbol, which this ties to the one at hand.
    return rows.new_empty(*rows.shape, _lookups[int(handle)].table.width, dtype=torch.float32)


@torch.library.custom_op("byrote::accumulate", mutates_args=())
def accumulate(gradient: Tensor, rows: Tensor, handle: int) -> Tensor:
    """Leave row gradients [..., W] of row ids [...] with the table; zeros [1] for the anchor, NaN if not all finite."""
    lookup = _lookups[handle]
    sums = lookup.pending.add(rows.reshape(-1), gradient.reshape(-1, lookup.table.width))
    if not sums.numel():
        return torch.zeros(1, device=gradient.device)
    return torch.stack(torch.aminmax(sums)).sum().mul(0).reshape(1)


@accumulate.register_fake
def _(gradient: Tensor, rows: Tensor, handle: int) -> Tensor:
    return gradient.new_empty(1, dtype=torch.float32)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    _, rows, ctx.handle = inputs
    ctx.save_for_backward(rows)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (rows,) = ctx.saved_tensors
    return accumulate(gradient, rows, ctx.handle), None, None


gather.register_autograd(_backward, setup_context=_save_for_backward)
