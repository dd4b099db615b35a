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

Gradient descent, for rows under `torch.optim.SGD`; with mu = 0 there is no state:

    m <- mu m + (1 - dampening) g    (the first time m <- g)       row <- row - lr * m    or    row - lr * (g + mu m)

Momentum with Sinkhorn balancing (DeepSeek-V4.1 report, sections 2.5, 3.1.3 and 4.2.2), over the U touched rows:

    M <- b M + (1 - b) G            U <- b M + (1 - b) G                (Nesterov)
    rows of U whose norm is at most tau times the mean norm become 0
    K times, K odd: divide U by the L2 norm + eps of each row (odd times) or of each column (even times)
    row <- row - gamma * lr * sqrt(W) * U

Its result depends on which rows are touched together: the mean norm and the columns are those of one step's rows.
The report balances a whole table; here a row that is not touched stands still, with its momentum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from byrote.compiled.loops import numba_is_there

RowState = dict[str, Tensor]
StateFields = Mapping[str, tuple[int, ...]]
CPU = torch.device("cpu")


class RowRule(ABC):
    """What an update rule offers. U touched rows of W values, all float32; the inputs stay as they are.

    in_place   there is a compiled form, `update_in_place`
    alone      a row's step is its own: ranks may each update the rows that they own
    """

    in_place = False
    alone = True

    @abstractmethod
    def fields(self, width: int) -> StateFields:
        """Names and per-row shapes of the state that the table keeps beside each touched row."""

    @abstractmethod
    def update(self, values: Tensor, state: RowState, gradient: Tensor, rate: float) -> tuple[Tensor, RowState]:
        """New values [U, W] and state of U rows from their summed gradient [U, W]."""

    def update_in_place(
        self, values: Tensor, ids: Tensor, state: RowState, entries: Tensor, gradient: Tensor, rate: float
    ) -> None:
        """Change the rows ids [U] of `values` and the entries [U] of every array of `state`; all on the CPU."""
        raise NotImplementedError

    @property
    def compiled(self) -> bool:
        return self.in_place and numba_is_there()

    def step(self, values: Tensor, state: RowState, gradient: Tensor, rate: float) -> tuple[Tensor, RowState]:
        """`update` by the loop, which changes values and state."""
        places = torch.arange(len(values))
        self.update_in_place(values, places, state, places, gradient, rate)
        return values, state


@dataclass(frozen=True, kw_only=True)
class LazyAdam(RowRule):
    """Adam per row, clocked by the row's own touches; no weight decay.

    `max_norm` bounds the L2 norm of one row's gradient (None: no bound); it stands in for `max_grad_norm`,
    which sees dense parameters only.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_norm: float | None = None
    in_place = True

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
        _loops().update_adam(*_addresses(arrays), *gradient.shape, *self.betas, self.eps, rate)


@dataclass(frozen=True, kw_only=True)
class RowAdagrad(RowRule):
    """Adagrad with one float32 of state a row; the rate falls as 1 / sqrt(touches). `max_norm` as in LazyAdam."""

    eps: float = 1e-8
    max_norm: float | None = None
    in_place = True

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
        _loops().update_adagrad(*_addresses(arrays), *gradient.shape, self.eps, rate)


@dataclass(frozen=True, kw_only=True)
class RowSGD(RowRule):
    """Gradient descent, with momentum per row that waits from one touch to the next; else as `torch.optim.SGD`."""

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False

    def fields(self, width: int) -> StateFields:
        return {"velocity": (width,), "touches": ()} if self.momentum else {}

    def update(self, values: Tensor, state: RowState, gradient: Tensor, rate: float) -> tuple[Tensor, RowState]:
        if not self.momentum:
            return torch.add(values, gradient, alpha=-rate), {}
        share = torch.where(state["touches"] > 0, 1 - self.dampening, 1.0)[:, None]
        velocity = state["velocity"] * self.momentum + gradient * share
        step = gradient + velocity * self.momentum if self.nesterov else velocity
        return torch.add(values, step, alpha=-rate), {"velocity": velocity, "touches": state["touches"] + 1}


@dataclass(frozen=True, kw_only=True)
class SinkhornMomentum(RowRule):
    """Momentum whose step has the same length in every touched row, and equal weight in every column.

    There is no `max_norm`: how long a gradient is counts only against the row's own earlier gradients.
    """

    beta: float = 0.95
    gamma: float = 0.18
    iterations: int = 11
    threshold: float = 1e-3  # tau
    eps: float = 1e-20
    alone = False

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


RULES: dict[str, type[RowRule]] = {"adam": LazyAdam, "adagrad": RowAdagrad, "sinkhorn": SinkhornMomentum}


def row_rule(name: str, **settings: Any) -> RowRule:
    """The rule of that name, with those of the settings that it knows; ValueError where another one is given.

    None stands for a setting that is not given; betas and eps, which an optimizer always has, may go unused.
    """
    if name not in RULES:
        raise ValueError(f"row_rule is {name!r}; it must be one of {', '.join(RULES)}")
    known = {field.name for field in fields(RULES[name])}  # type: ignore[arg-type]
    for key in settings.keys() - known - {"betas", "eps"}:
        if settings[key] is not None:
            raise ValueError(f"row_{key} has no effect under row_rule={name!r}: drop it")
    return RULES[name](**{key: value for key, value in settings.items() if key in known and value is not None})


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


def _loops() -> Any:
    from byrote.tables.loops import rules

    return rules
