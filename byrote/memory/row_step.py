"""Rows move in the step of the optimizer that holds their anchors, whichever optimizer that is.

`byrote.train.Optimizer` moves them itself. Any other `torch.optim.Optimizer` is met through torch's hooks around every
step: before it the rows move, and the anchors' gradients are taken away, so that it passes the anchors by. With a
closure, gradients are made in the step, and the rows move behind it.

    optimizer                 rule of the rows                                  state a row
    SGD                       the same: momentum, dampening, Nesterov           momentum, if any
    with betas (Adam, ...)    lazy Adam with these betas and this eps           exp_avg, exp_avg_sq, touches
    another                   lazy Adam                                         exp_avg, exp_avg_sq, touches

The rate is that of the anchor's param group; there is no weight decay. The Engram paper has 5 times the dense rate:
give the anchors a group of their own for that. State is kept, saved and resumed with the rows, as it always is.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from byrote.memory.identity import change_of
from byrote.memory.memory import Memory, alive
from byrote.tables.rules import LazyAdam, RowRule, RowSGD

# Their rate is not the length of a step, or they try several steps in one.
WITHOUT_RATE = (torch.optim.LBFGS, torch.optim.Adadelta, torch.optim.Rprop, torch.optim.ASGD)


class TableWarning(UserWarning):
    """A table that trains badly, or not at all."""


@dataclass(frozen=True)
class Move:
    """What one step does to a table: the rows [U] that this rank moves, by gradients [U, W]; how many move in all."""

    memory: Memory
    rule: RowRule
    rows: Tensor
    gradient: Tensor
    total: int

    def apply(self, rate: float) -> None:
        if len(self.rows):  # a rank may have none of those that move
            self.memory.table.update(self.rule, self.rows, self.gradient, rate)
        self.memory.commit(change_of(self.memory.table, self.rows, self.total))


@torch.no_grad()
def take_moves(rules: Mapping[Memory, RowRule]) -> list[Move]:
    """Of each memory that is to move, by its rule, what waited for it; then that waits no longer.

    RuntimeError, on all ranks, if a gradient is not finite. It goes on waiting, and is refused until it is zeroed.
    """
    found = []
    for memory in rules:
        pending, anchor, table = memory.lookup.pending, memory.anchor, memory.table
        pending.claim(anchor)
        pending.follow(anchor)
        nothing = anchor.new_empty(0, dtype=torch.int64), anchor.new_empty(0, table.width, dtype=torch.float32)
        found.append((memory, *table.exchange(*(pending.sum() or nothing))))
    # After the exchange of all of them: a rank that raised alone would leave the others waiting for it.
    moves = []
    for memory, rows, gradient in found:
        total, bad = memory.table.totals(len(rows), _not_finite(gradient))
        if total:
            memory.table.check_rule(rules[memory])
        if bad:
            raise RuntimeError(
                f"{bad} of {total} row gradients are not finite; nothing was changed. "
                "Lower the learning rate, or zero the gradients and skip this batch"
            )
        if total:
            moves.append(Move(memory, rules[memory], rows, gradient, total))
    for memory in rules:
        memory.lookup.pending.drop()
    return moves


def rule_of(optimizer: torch.optim.Optimizer, memory: Memory) -> RowRule:
    """How the rows of a memory move under an optimizer. ValueError if they cannot."""
    if _is_ours(optimizer):
        return optimizer.rule  # type: ignore[attr-defined]
    group, name = _groups(optimizer).get(id(memory.anchor)), type(optimizer).__name__
    if group is None and memory.anchor.requires_grad:
        raise ValueError(
            f"{name} holds no anchor of a table of {memory.table.num_rows} rows: give it all of model.parameters(), or "
            "freeze the table: memory.anchor.requires_grad_(False)"
        )
    if group is None:
        return LazyAdam()  # for a table that stands still
    if isinstance(optimizer, WITHOUT_RATE) or group.get("lr") is None:
        raise ValueError(
            f"{name} cannot move the rows of tables: it has no rate that is the length of a step. Take AdamW, SGD or "
            "byrote.train.Optimizer(model), or freeze the tables: memory.anchor.requires_grad_(False)"
        )
    if isinstance(optimizer, torch.optim.SGD):
        return RowSGD(**{name: group[name] for name in ("momentum", "dampening", "nesterov")})
    if "betas" in group:
        first, second = (float(beta) for beta in group["betas"][:2])
        return LazyAdam(betas=(first, second), eps=float(group.get("eps", 1e-8)))
    return LazyAdam()


def _before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not alive or _is_ours(optimizer):
        return
    for memory in _held(optimizer):
        rule_of(optimizer, memory)  # raises before anything has moved
    if not _closure(args, kwargs):
        _move_rows(optimizer)


def _after(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if alive and not _is_ours(optimizer) and _closure(args, kwargs):
        _move_rows(optimizer)


def _is_ours(optimizer: torch.optim.Optimizer) -> bool:
    return getattr(optimizer, "moves_rows", False)


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(callable(given) for given in (*args[1:], kwargs.get("closure")))  # args[0] is the optimizer


def _move_rows(optimizer: torch.optim.Optimizer) -> None:
    _warn_of_tables_that_nobody_holds(optimizer)
    rules = {memory: rule_of(optimizer, memory) for memory in _held(optimizer) if memory.anchor.grad is not None}
    if rules and getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "the optimizer is to undo the scale of a GradScaler itself, which row gradients cannot follow: call "
            "scaler.unscale_(optimizer) before scaler.step(optimizer), or train in float32 or bfloat16"
        )
    skipped = bool(getattr(optimizer, "found_inf", None))  # by order of the scaler
    groups = _groups(optimizer)
    for move in [] if skipped else take_moves(rules):
        group = groups[id(move.memory.anchor)]
        move.apply(float(group["lr"]) * (-1 if group.get("maximize") else 1))
    with torch.no_grad():
        for memory in rules:
            memory.lookup.pending.drop()
            assert memory.anchor.grad is not None
            memory.anchor.grad.zero_()  # of the step, and there as any parameter's
            memory.anchor.zero_()  # a closure's step has seen the mark


def _groups(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}


def _held(optimizer: torch.optim.Optimizer) -> list[Memory]:
    """The memories that this optimizer moves, in one order on all ranks."""
    groups = _groups(optimizer)
    return [memory for memory in list(alive.values()) if id(memory.anchor) in groups and memory.anchor.requires_grad]


_asked: weakref.WeakSet[Memory] = weakref.WeakSet()


def _warn_of_tables_that_nobody_holds(optimizer: torch.optim.Optimizer) -> None:
    groups = _groups(optimizer)
    for memory in list(alive.values()):
        if memory in _asked or not memory.lookup.pending.parts or id(memory.anchor) in groups:
            continue
        _asked.add(memory)
        others = (each for each in gc.get_objects() if issubclass(type(each), torch.optim.Optimizer))
        if not any(id(memory.anchor) in _groups(other) for other in others):
            warnings.warn(
                f"a table of {memory.table.num_rows} rows has gradients, but no optimizer holds its anchor: its rows "
                "stand still. Give the optimizer all of model.parameters(), byrote.train.Optimizer(model) does, or "
                "freeze the table: memory.anchor.requires_grad_(False)",
                TableWarning,
                stacklevel=6,
            )


def _not_finite(gradient: Tensor) -> int:
    """How many rows hold a number that is not finite."""
    if not len(gradient) or torch.stack(torch.aminmax(gradient)).isfinite().all():  # both are NaN if anything is
        return 0
    return int((~gradient.isfinite()).any(dim=1).sum())


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)
