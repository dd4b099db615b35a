"""Table: row ids in, rows out; nothing about tokens, layers or gradients.

A table holds `num_rows` rows of `width` values. It is not a Module, Parameter or buffer: it is absent from
`state_dict`, `.to` and `.half` do not touch it and pickling is refused. Rows change only through `write` and `update`,
and `commit` closes one step of changes by raising `generation` by one.

`copy.deepcopy` gives a table of its own, at the cost of the rows that change afterwards (`placements/copied.py`): who
writes a table first shows the rows to its `followers`, which are the copies that are still in use.

Beside its values a row may carry the state of an update rule (`byrote.tables.rules`). That state is stored with
the rows, for touched rows only, so it grows with the rows that were ever updated and not with the table.

`generation` is the table's age, `identity` tells it from others of that age: a digest of how its rows came about, which
moves on with every step (`byrote.memory.identity`). A table that was saved without one has UNKNOWN.

A table may be read on another thread than it is written on. `writes` counts how often rows were written, before the
first of them changes: values that were read while it changed may be of two moments, and who reads ahead
(`byrote.memory.prefetch`) throws them away.
"""

from __future__ import annotations

import hashlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from byrote.tables.placements.ranks import mean_over_ranks
from byrote.tables.rules import CPU, RowRule, RowState, StateFields

UNKNOWN = 0  # identity of a table or a backbone that was saved without one


class Follower(Protocol):
    """Who must see rows before they change."""

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


class Table(ABC):
    """What every placement offers, with what most of them do alike.

    U row ids, W = `width`; row ids are int64 in [0, `num_rows`). ValueError where one is not.

        device         where the state of rows lies and the row rule runs
        apart          rows may be read on another thread than they are written on
        asynchronous   rows of ids on a GPU are read there: a read is queued, and the host does not wait
        sharded        rows are spread over ranks: reading and saving is for all ranks together
        settled        what is loaded in this table's place goes to where it is, with `place`
    """

    num_rows: int
    width: int
    digest: str
    generation: int
    identity: int
    writes: int = 0
    device = CPU
    apart = True
    asynchronous = False
    sharded = False
    settled = False

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a table is not pickled: save the model with save_pretrained, which writes its tables beside it"
        )

    @abstractmethod
    def read(self, rows: Tensor) -> Tensor:
        """Rows [..., W] in float32 for row ids [...] of any shape, on the device of `rows`."""

    @abstractmethod
    def read_state(self, rows: Tensor, fields: StateFields) -> RowState:
        """Rule state of rows [U]: one tensor [U, *shape] a field, zeros for rows never written with state."""

    @abstractmethod
    def write(self, rows: Tensor, values: Tensor, state: RowState | None = None) -> None:
        """Store values [U, W], and rule state if given, at unique row ids [U]."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the rows to one file: a temporary name first, then a rename."""

    @abstractmethod
    def save_state(self, path: Path) -> None:
        """Write the rule state of the touched rows to one file, likewise."""

    @abstractmethod
    def load_state(self, path: Path) -> None:
        """Read back what `save_state` wrote; ValueError where it belongs to other rows."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """Rows, width, bytes, generation, rows with rule state."""

    def commit(self) -> int:
        """Close a step of writes: raise `generation` by one and return it."""
        self.generation += 1
        return self.generation

    def checkpoint(self, path: Path) -> bool:
        """Make rows and their state durable in place and write a pointer to them, if this placement can."""
        return False

    def lock(self) -> None:
        """Take the right to change the files that hold the rows; ValueError where another process has it."""

    def unlock(self) -> None:
        """Give it back."""

    def close(self) -> None:
        """Let go of files, before the table is forgotten."""

    def collect(self, pointers: Iterable[Path]) -> None:
        """Drop from disk what none of the `pointers`, which `checkpoint` wrote, leads to."""

    def readdress(self, digest: str) -> None:
        """Belong to another address spec, by which ids lead to the same rows; ValueError where files say otherwise."""
        raise ValueError(
            f"a {type(self).__name__} belongs to the vocabulary that its files name: open the model with "
            "placement='host', resize and save it, and open what was saved"
        )

    def place(self, table: Any) -> Table:
        """The same rows as `table` has in RAM, where this table is."""
        return table

    def cold(self, rows: Tensor) -> bool:
        """Whether reading row ids [...] would wait for a device (a sample is looked at); then that has begun."""
        return False

    def warm(self, rows: Tensor) -> None:
        """Bring rows into memory, waiting for the device. It changes nothing."""

    def check_rule(self, rule: RowRule) -> None:
        """ValueError where the rule cannot change these rows."""

    def update(self, rule: RowRule, rows: Tensor, gradient: Tensor, rate: float) -> None:
        """One step of the rule: unique rows [U] by their summed gradient [U, W]."""
        step = rule.update
        if rule.compiled and self.device == CPU:
            rows, gradient, step = rows.cpu(), gradient.cpu().contiguous(), rule.step
        values, state = self.read(rows), self.read_state(rows, rule.fields(self.width))
        values, state = step(values, state, gradient, rate)
        self.write(rows, values, state or None)  # nothing is kept for a rule without state

    @property
    def own(self) -> Table:
        """Of a sharded table the rows of this rank, else the table."""
        return self

    def read_own(self, rows: Tensor) -> Tensor:
        """`read` of rows that this rank owns, which takes no other rank."""
        return self.read(rows)

    def exchange(self, rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Unique ascending rows [U] and gradients [U, W] of this rank -> those it has to apply, means over the ranks.

        Collective: every rank calls it for every table, with no rows too.
        """
        return mean_over_ranks(rows, gradient)

    def totals(self, *numbers: int) -> list[int]:
        """Numbers of what this rank has to apply -> those of the whole table, the same on all ranks."""
        return list(numbers)


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
