"""Row update rules: pure functions from (values, state, gradient, rate) of touched rows to new values and state.

`update_rows` applies one to a table. Adam and Adagrad also have a compiled form that changes rows and state where they
are; it is what runs on a CPU, on a table's own arrays or on copies, so that every placement gives the same bits.

Lazy Adam (Kingma & Ba 2015, algorithm 1), each row on its own clock. With t = how often this row was touched:

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2          t <- t + 1
    row <- row - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

A row that is touched k times moves exactly as a dense `torch.optim.Adam` moves a parameter that gets those k
gradients one after the other. Two other readings of "Adam on a sparse table" were rejected:

- one global clock t (torch's SparseAdam): a row first met at step 10,000 has m = 0.1 g, v = 0.001 g^2 and both
  corrections near 1, so its first step is 3.2 times too long;
- decaying m and v for the steps in which the row was absent (what a dense Adam does to it): v forgets the row's
  gradient scale while the row waits, and the next step is too long again, by up to (1 - b1) / sqrt(1 - b2).

A gradient of a row exists only when its n-gram occurs, so the moments are statistics over occurrences.
The Engram paper (section 4.1, table 5) asks for Adam at 5x the backbone's rate without weight decay and says
nothing of the clock.

Row-wise Adagrad (Duchi et al. 2011, with one sum a row as in FBGEMM and DLRM; 4 bytes of state a row):

    v <- v + mean(g^2)              row <- row - lr * g / (sqrt(v) + eps)

Momentum with Sinkhorn balancing (DeepSeek-V4.1 report, sections 2.5, 3.1.3 and 4.2.2), over the U touched rows:

    M <- b M + (1 - b) G            U <- b M + (1 - b) G                (Nesterov)
    rows of U whose norm is at most tau times the mean norm become 0
    K times, K odd: divide U by the L2 norm + eps of each row (odd times) or of each column (even times)
    row <- row - gamma * lr * sqrt(W) * U

Its result depends on which rows are touched together: the mean norm and the columns are those of one step's rows.
The report balances a whole table; here a row that is not touched stands still, with its momentum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from byrote.compiled.loops import numba_is_there
from byrote.tables.table import RowState, StateFields, Table
from byrote.tables.touched import CPU


class RowRule(Protocol):
    """What an update rule offers. U touched rows of W values, all float32; the inputs stay as they are."""

    def fields(self, width: int) -> StateFields:
        """Names and per-row shapes of the state that the table keeps beside each touched row."""
        ...

    def update(self, values: Tensor, state: RowState, gradient: Tensor, rate: float) -> tuple[Tensor, RowState]:
        """New values [U, W] and state of U rows from their summed gradient [U, W]."""
        ...


@runtime_checkable
class InPlaceRule(RowRule, Protocol):
    def update_in_place(
        self, values: Tensor, ids: Tensor, state: RowState, entries: Tensor, gradient: Tensor, rate: float
    ) -> None:
        """Change the rows ids [U] of `values` and the entries [U] of every array of `state`; all on the CPU."""
        ...


@runtime_checkable
class InPlaceTable(Protocol):
    def update(self, rule: InPlaceRule, rows: Tensor, gradient: Tensor, rate: float) -> None: ...


def update_rows(table: Table, rule: RowRule, rows: Tensor, gradient: Tensor, rate: float) -> None:
    """One step of unique rows [U] by their summed gradient [U, W]."""
    on_cpu = getattr(table, "device", CPU) == CPU  # rows on an accelerator are updated there
    compiled = isinstance(rule, InPlaceRule) and numba_is_there() and on_cpu
    if compiled:
        assert isinstance(rule, InPlaceRule)
        rows, gradient = rows.cpu(), gradient.cpu().contiguous()
        if isinstance(table, InPlaceTable):
            table.update(rule, rows, gradient, rate)
            return
    values, state = table.read(rows), table.read_state(rows, rule.fields(table.width))
    if compiled:
        assert isinstance(rule, InPlaceRule)
        places = torch.arange(len(rows))
        rule.update_in_place(values, places, state, places, gradient, rate)
    else:
        values, state = rule.update(values, state, gradient, rate)
    table.write(rows, values, state)


@dataclass(frozen=True, kw_only=True)
class LazyAdam:
    """Adam per row, clocked by the row's own touches; no weight decay.

    `max_norm` bounds the L2 norm of one row's gradient (None: no bound); it stands in for `max_grad_norm`,
    which sees dense parameters only.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_norm: float | None = None

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        _check_max_norm(self.max_norm)

    def fields(self, width: int) -> StateFields:
        return {"exp_avg": (width,), "exp_avg_sq": (width,), "touches": ()}

    def update(self, values: Tensor, state: RowState, gradient: Tensor, rate: float) -> tuple[Tensor, RowState]:
        gradient = _clipped(gradient, self.max_norm)
        beta1, beta2 = self.betas
        touches = state["touches"] + 1
        exp_avg = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
        exp_avg_sq = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction1, correction2 = _corrections(self.betas, touches)[:, :, None].unbind(1)
        denominator = (exp_avg_sq / correction2).sqrt_().add_(self.eps)
        values = torch.addcdiv(values, exp_avg / correction1, denominator, value=-rate)
        return values, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "touches": touches}

    def update_in_place(
        self, values: Tensor, ids: Tensor, state: RowState, entries: Tensor, gradient: Tensor, rate: float
    ) -> None:
        gradient = _clipped(gradient, self.max_norm)
        touches = state["touches"].index_select(0, entries) + 1
        state["touches"].index_copy_(0, entries, touches)
        corrections = _corrections(self.betas, touches)
        arrays = (values, ids, state["exp_avg"], state["exp_avg_sq"], entries, gradient, corrections)
        _kernels().update_adam(*_addresses(arrays), *gradient.shape, *self.betas, self.eps, rate)


@dataclass(frozen=True, kw_only=True)
class RowAdagrad:
    """Adagrad with one float32 of state a row; the rate falls as 1 / sqrt(touches). `max_norm` as in LazyAdam."""

    eps: float = 1e-8
    max_norm: float | None = None

    def __post_init__(self) -> None:
        _check_max_norm(self.max_norm)

    def fields(self, width: int) -> StateFields:
        return {"sum_sq": ()}

    def update(self, values: Tensor, state: RowState, gradient: Tensor, rate: float) -> tuple[Tensor, RowState]:
        gradient = _clipped(gradient, self.max_norm)
        sum_sq = state["sum_sq"] + gradient.square().mean(1)
        return torch.addcdiv(values, gradient, (sum_sq.sqrt() + self.eps)[:, None], value=-rate), {"sum_sq": sum_sq}

    def update_in_place(
        self, values: Tensor, ids: Tensor, state: RowState, entries: Tensor, gradient: Tensor, rate: float
    ) -> None:
        gradient = _clipped(gradient, self.max_norm)
        arrays = values, ids, state["sum_sq"], entries, gradient
        _kernels().update_adagrad(*_addresses(arrays), *gradient.shape, self.eps, rate)


@dataclass(frozen=True, kw_only=True)
class SinkhornMomentum:
    """Momentum whose step has the same length in every touched row, and equal weight in every column.

    There is no `max_norm`: how long a gradient is counts only against the row's own earlier gradients.
    """

    beta: float = 0.95
    gamma: float = 0.18
    iterations: int = 11
    threshold: float = 1e-3  # tau
    eps: float = 1e-20

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {self.beta}")
        if self.iterations < 1 or self.iterations % 2 == 0:
            raise ValueError(f"iterations must be odd, to end with the rows, got {self.iterations}")

    def fields(self, width: int) -> StateFields:
        return {"momentum": (width,)}

    def update(self, values: Tensor, state: RowState, gradient: Tensor, rate: float) -> tuple[Tensor, RowState]:
        momentum = torch.lerp(state["momentum"], gradient, 1 - self.beta)
        step = torch.lerp(momentum, gradient, 1 - self.beta)
        norms = step.norm(dim=1, keepdim=True)
        step = torch.where(norms > self.threshold * norms.mean(), step, 0)
        for i in range(self.iterations):
            step = step / (step.norm(dim=1 - i % 2, keepdim=True) + self.eps)
        length = self.gamma * rate * values.shape[1] ** 0.5
        return torch.add(values, step, alpha=-length), {"momentum": momentum}


def _corrections(betas: tuple[float, float], touches: Tensor) -> Tensor:
    """1 - beta^t for both, [U, 2]; by float64, as 1 - 0.999 has three digits less in float32."""
    last = int(touches.max()) if len(touches) else 0
    if last < len(touches) // 2:  # a power each is slow
        return _corrections(betas, torch.arange(last + 1, device=touches.device)).index_select(0, touches.long())
    return torch.stack([1 - beta ** touches.double() for beta in betas], 1).float()


def _clipped(gradient: Tensor, max_norm: float | None) -> Tensor:
    if max_norm is None:
        return gradient
    return gradient * (max_norm / gradient.norm(dim=1, keepdim=True).clamp_min(max_norm))


def _check_max_norm(max_norm: float | None) -> None:
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive or None, got {max_norm}")


def _addresses(arrays: tuple[Tensor, ...]) -> list[int]:
    for array in arrays:
        assert array.is_contiguous() and array.device.type == "cpu" and array.dtype in (torch.float32, torch.int64)
    return [array.data_ptr() for array in arrays]


def _kernels() -> Any:
    from byrote.tables import rule_kernels

    return rule_kernels
