"""What goes wrong with tables without an error: one warning for each table and kind, with the remedy.

    still      no row moved in `PATIENCE` steps
    frozen     the anchor is frozen and the model is in training mode
    dead head  of a table that moves, no row of one hash head moved in `PATIENCE` steps
    blow-up    the moved rows' root mean square is `GROWTH` times what it was at the first look

Rows are looked at every `EVERY` steps, at most `SAMPLE` of those that moved: the cost does not grow with the table.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from byrote.memory import Memory, MemoryStack, TableWarning

PATIENCE, EVERY, SAMPLE, GROWTH = 100, 10, 256, 100.0


@dataclass
class _Seen:
    starts: Tensor  # first row of each head
    still: int = 0  # steps since a row moved
    looks: int = 0
    first_rms: float = 0.0

    def __post_init__(self) -> None:
        self.heads = torch.zeros(len(self.starts), dtype=torch.bool)


class Guards:
    """Of all tables of one model; `look` after each step of the optimizer."""

    def __init__(self, stack: MemoryStack | None) -> None:
        self.memories = dict(() if stack is None else stack.items())
        self.seen = {
            layer: _Seen(torch.tensor(stack.spec.layer(layer).offsets)) for layer in self.memories if stack is not None
        }
        self.warned: set[tuple[int, str]] = set()
        self.steps = 0

    @torch.no_grad()
    def look(self, moved: dict[Memory, Tensor]) -> None:
        """`moved`: the ids of the rows [U] that this step moved, of each memory that it moved."""
        self.steps += 1
        for layer, memory in self.memories.items():
            seen, rows = self.seen[layer], moved.get(memory)
            seen.still = 0 if rows is not None and len(rows) else seen.still + 1
            if not memory.anchor.requires_grad:
                if memory.training:
                    self._warn(
                        layer,
                        "frozen",
                        "is frozen while the model is in training mode: its rows stay as they are. To train it, set "
                        "anchor.requires_grad_(True) before the optimizer is made; else ignore TableWarning",
                    )
            elif seen.still == PATIENCE:
                self._warn(
                    layer,
                    "still",
                    f"got no update in {PATIENCE} steps: no gradient reaches it. Is its block detached or frozen above "
                    "it, its anchor in no param group, every label masked?",
                )
            if rows is not None and len(rows) and self.steps % EVERY == 0:
                self._look_at(layer, memory.table, seen, rows.cpu())

    def _look_at(self, layer: int, table: Any, seen: _Seen, rows: Tensor) -> None:
        seen.looks += 1
        seen.heads[(torch.bucketize(rows, seen.starts, right=True) - 1).unique()] = True
        if seen.looks * EVERY >= PATIENCE:
            if not seen.heads.all():
                dead = (~seen.heads).nonzero().flatten().tolist()
                self._warn(
                    layer,
                    "dead",
                    f"has heads of which no row moved in {PATIENCE} steps: columns {dead} (order by order). Is "
                    "the text shorter than the order, or the key or value projection of these columns zero?",
                )
            seen.looks = 0
            seen.heads.zero_()
        if table.sharded:  # reading it is for all ranks together
            return
        rms = float(table.read(rows[:SAMPLE]).square().mean().sqrt())
        seen.first_rms = seen.first_rms or rms
        if not rms <= GROWTH * seen.first_rms:
            self._warn(
                layer,
                "blow-up",
                f"has rows of root mean square {rms:.3g}, {seen.first_rms:.3g} at first: lower the rate of the rows "
                "(row_rate) or bound their gradients (row_max_norm)",
            )

    def _warn(self, layer: int, kind: str, text: str) -> None:
        if (layer, kind) not in self.warned:
            self.warned.add((layer, kind))
            warnings.warn(f"the table of layer {layer} {text}", TableWarning, stacklevel=4)
