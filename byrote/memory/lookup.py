"""Reading rows inside the autograd graph without a gradient the size of a table.

    gather(anchor, rows, handle)       -> values [..., W]      forward; `anchor` is what autograd sees of the table
    accumulate(gradient, rows, handle) -> zeros [1]            its backward; the gradient of the anchor

The row gradients leave the graph here: they wait in the table's `Pending` until `optimizer.step` consumes them.
There is no double backward. A `handle` is a plain integer, so that the two ops can stand in a compiled graph. Rows
that were asked for ahead of time (`prefetch.py`) are known by the tensor of their ids; `gather` then waits for them.
"""

from __future__ import annotations

import copy
import itertools
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from byrote.memory.prefetch import Reading, Times, begin, warm
from byrote.tables.records import sum_rows
from byrote.tables.table import Table


@dataclass(eq=False)
class Pending:
    """Row gradients that wait for the optimizer: one float32 sum a row, summed in a fixed order."""

    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, rows: Tensor, gradient: Tensor) -> None:
        """Add row gradients [M, W] of row ids [M] (duplicates allowed)."""
        self.parts.append(sum_rows(rows, gradient.float()))

    def drop(self) -> None:
        self.parts.clear()

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Unique ascending row ids [U] and their summed gradients [U, W], and forget them; None if there are none.

        A row whose gradient is zero is not among them. It was read where nothing is learned (padding, the last token
        of a row, a masked label), and by the rule a touch ages its moments: padding would leave a trace in training.
        """
        parts, self.parts = self.parts, []
        if not parts:
            return None
        if len(parts) > 1:
            rows, gradient, _ = (torch.cat(column) for column in zip(*parts, strict=True))
            parts = [sum_rows(rows, gradient)]
        rows, gradient, touched = parts[0]
        if not touched.any():
            return None
        return (rows, gradient) if touched.all() else (rows[touched], gradient[touched])


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
    """Leave row gradients [..., W] of row ids [...] with the table; zeros [1] for the anchor."""
    lookup = _lookups[handle]
    lookup.pending.add(rows.reshape(-1), gradient.reshape(-1, lookup.table.width))
    return torch.zeros(1, device=gradient.device)


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
