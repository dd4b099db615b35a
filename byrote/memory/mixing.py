"""What the rows of a memory are to become: a weighted sum of tables, as arithmetic on its anchor has it (`anchor.py`).

A `Mixing` waits until the rows are next read, or until one of its tables is about to change. Then the rows are
computed, those only in which the tables may differ: among copies of one table few, else all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from byrote.memory.identity import next_identity
from byrote.tables.placements.copied import differing
from byrote.tables.table import Table

Weights = dict[Any, float]  # by table
TOLERANCE = 1e-4  # of the sum of weights
CHUNK = 1 << 16  # rows at a time


class Mixing:
    """What the rows of one memory are to become. It follows the tables in `weights`, which do not change before."""

    def __init__(self, memory: Any, weights: Weights | None) -> None:
        self.memory, self.weights = weakref.ref(memory), weights
        for table in weights or {}:
            table.followers.add(self)

    def keep(self, rows: Tensor) -> None:
        memory = self.memory()
        if memory is not None and memory.mixing is self:
            settle(memory)

    def alone(self, table: Table) -> bool:
        """Whether there is no more to it than a factor on the table's own anchor, or a value from elsewhere."""
        return self.weights is not None and not self.weights.keys() - {table}

    def fingerprint(self) -> int:
        """Of the tables and weights in it."""
        parts = [(source.identity, int(weight * 2**40)) for source, weight in (self.weights or {}).items()]
        return next_identity(*(number for part in parts for number in part))

    def check(self, table: Table) -> None:
        if self.weights is None or abs(sum(self.weights.values()) - 1) > TOLERANCE:
            found = "no sum of rows as they are now" if self.weights is None else f"weights {[*self.weights.values()]}"
            raise ValueError(
                f"the parameters of a memory were changed by arithmetic that its rows cannot follow ({found}): rows "
                "can become an average of tables, with weights that sum to 1, of models that are still there (not of "
                "tensors that were cloned before the last step). Keep what is to be averaged or brought back by "
                "copy.deepcopy(model), or load it with from_pretrained"
            )
        if foreign := [other.digest for other in self.weights if other.digest != table.digest]:
            raise ValueError(
                f"the rows of a table with digest {table.digest} cannot be averaged with those of {foreign[0]}: the "
                "models need one address spec"
            )


@torch.inference_mode(False)  # rows are written again in other modes
@torch.no_grad()
def settle(memory: Any) -> None:
    """Let the rows of a memory, and of those that are made of them, become what their anchors stand for."""
    if memory.mixing is None:
        return
    if memory.mixing.alone(rows_table(memory)):
        memory.mixing = None
        return
    group = _group(memory)
    for each in group:
        each.mixing.check(rows_table(each))
        rows_table(each).write(*_no_rows(rows_table(each)))  # refuses where rows cannot change
    parts = [_parts(rows_table(each), each.mixing.weights) for each in group]
    if len(group) > 1:  # they are made of one another: all are computed before any is changed
        parts = [iter(list(part)) for part in parts]
    changes = [each.mixing.fingerprint() for each in group]
    for each in group:
        each.mixing = None
    for each, part, change in zip(group, parts, changes, strict=True):
        for rows, values in part:
            rows_table(each).write(rows, values)
        each.commit(change)  # what was made of the buffers beside the anchor is void


def rows_table(memory: Any) -> Any:
    """Its rows; of a sharded table, those of this rank."""
    return memory.lookup.table.own


def _no_rows(table: Table) -> tuple[Tensor, Tensor]:
    return torch.zeros(0, dtype=torch.int64), torch.zeros(0, table.width)


def _group(memory: Any) -> list[Any]:
    """The memory, and those whose rows are to be made of one of the group's."""
    found = [memory]
    for each in found:
        for follower in rows_table(each).followers:
            other = follower.memory() if isinstance(follower, Mixing) else None
            if other is None or other in found or other.mixing is not follower or follower.alone(rows_table(other)):
                continue
            found.append(other)
    return found


def _parts(table: Any, weights: Weights) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows that change [U], and their new values [U, W], some at a time."""
    for rows in differing([table, *weights]).split(CHUNK):
        values = torch.zeros(len(rows), table.width, dtype=torch.float64)
        for source, weight in weights.items():
            values += weight * source.read(rows) if weight else 0.0
        changed = (values.float() != table.read(rows)).any(1)
        if changed.any():
            yield rows[changed], values.float()[changed]
