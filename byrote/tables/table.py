"""The Table protocol: row ids in, rows out; nothing about tokens, layers or gradients.

A table holds `num_rows` rows of `width` values. It is not a Module, Parameter or buffer: it is absent from
`state_dict`, `.to` and `.half` do not touch it and pickling is refused. Rows change only through `write`, and `commit`
closes one step of changes by raising `generation` by one.

`copy.deepcopy` gives a table of its own, at the cost of the rows that change afterwards (`byrote.tables.copied`): who
writes a table first shows the rows to its `followers`, which are the copies that are still in use.

Beside its values a row may carry the state of an update rule (`byrote.tables.rules`). That state is stored with
the rows, for touched rows only, so it grows with the rows that were ever updated and not with the table.

`generation` is the table's age, `identity` tells it from others of that age: a digest of how its rows came about, which
moves on with every step (`byrote.memory.identity`). A table that was saved without one has UNKNOWN.

A table may be read on another thread than it is written on, if it has `writes`: how often rows were written, counted
before the first of them changes. Values that were read while the number changed may be of two moments; who reads ahead
(`byrote.memory.prefetch`) throws them away. If its reads can wait for a device, it also has

    cold(rows) -> bool   whether reading row ids [...] would wait (a sample is looked at); their reads have then begun
    warm(rows)           bring rows into memory, waiting for the device; returns nothing and changes nothing

A table with a true `asynchronous` reads row ids that are on a GPU there: a read is queued, and the host does not wait.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

RowState = dict[str, Tensor]
StateFields = Mapping[str, tuple[int, ...]]


UNKNOWN = 0  # identity of a table or a backbone that was saved without one


class Follower(Protocol):
    def keep(self, rows: Tensor) -> None:
        """Rows [U] of the table that is followed are about to change."""
        ...


class Followers:
    """Who must see rows of a table before they change. One that nobody uses any more is forgotten."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[Follower] = weakref.WeakSet()
        self.changes = 0  # how often rows changed

    def __iter__(self) -> Iterator[Follower]:
        return iter(list(self._all))

    def add(self, follower: Follower) -> None:
        self._all.add(follower)

    def keep(self, rows: Tensor) -> None:
        if not rows.numel():
            return
        for follower in self:
            follower.keep(rows)
        self.changes += 1


@runtime_checkable
class Table(Protocol):
    """What every placement offers. U row ids, W = `width`; row ids are int64 in [0, `num_rows`)."""

    num_rows: int
    width: int
    digest: str
    generation: int
    identity: int

    def read(self, rows: Tensor) -> Tensor:
        """Rows [..., W] in float32 for row ids [...] of any shape, on the device of `rows`."""
        ...

    def read_state(self, rows: Tensor, fields: StateFields) -> RowState:
        """Rule state of rows [U]: one tensor [U, *shape] a field, zeros for rows never written with state."""
        ...

    def write(self, rows: Tensor, values: Tensor, state: RowState | None = None) -> None:
        """Store values [U, W], and rule state if given, at unique row ids [U]."""
        ...

    def commit(self) -> int:
        """Close a step of writes: raise `generation` by one and return it."""
        ...

    def save(self, path: Path) -> None:
        """Write the rows to one file: a temporary name first, then a rename."""
        ...

    def save_state(self, path: Path) -> None:
        """Write the rule state of the touched rows to one file, likewise."""
        ...

    def load_state(self, path: Path) -> None:
        """Read back what `save_state` wrote; ValueError where it belongs to other rows."""
        ...

    def stats(self) -> dict[str, Any]:
        """Rows, width, bytes, generation, rows with rule state."""
        ...


def first_identity(*about: Any) -> int:
    """Of a table that no step has changed yet, by what its rows are drawn from."""
    return int.from_bytes(hashlib.sha256(repr(about).encode()).digest()[:8]) >> 1 or 1


def check_row_ids(rows: Tensor, num_rows: int) -> None:
    """Refuse row ids outside [0, num_rows): an out-of-range id must never wrap around or be read."""
    if rows.dtype != rows.new_empty(0).long().dtype:
        raise ValueError(f"rows must be int64, got {rows.dtype}: addresses are integers from byrote.address")
    if not rows.numel():
        return
    # Negative numbers are the largest of all without a sign: one pass, and NumPy's is quick.
    if rows.device.type == "cpu" and int(rows.numpy().view(np.uint64).max()) < num_rows:
        return
    low, high = (int(end) for end in torch.aminmax(rows))
    if low < 0 or high >= num_rows:
        raise ValueError(
            f"row ids {low}..{high} leave the table of {num_rows} rows: "
            "the address spec and the table do not belong together"
        )
