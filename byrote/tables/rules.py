"""Row update rules: pure functions from (values, state, gradient, rate) of touched rows to new values and state.

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
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from byrote.tables.table import RowState, StateFields


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
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"max_norm must be positive or None, got {self.max_norm}")

    def fields(self, width: int) -> StateFields:
        """Names and per-row shapes of the state that the table keeps beside each touched row."""
        return {"exp_avg": (width,), "exp_avg_sq": (width,), "touches": ()}

    def update(self, values: Tensor, state: RowState, gradient: Tensor, rate: float) -> tuple[Tensor, RowState]:
        """New values [U, W] and state of U rows from their summed gradient [U, W], all float32."""
        if self.max_norm is not None:
            norm = gradient.norm(dim=1, keepdim=True)
            gradient = gradient * (self.max_norm / norm.clamp_min(self.max_norm))
        beta1, beta2 = self.betas
        touches = state["touches"] + 1
        exp_avg = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
        exp_avg_sq = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction1 = (1 - beta1**touches).unsqueeze(1)
        correction2 = (1 - beta2**touches).unsqueeze(1)
        denominator = (exp_avg_sq / correction2).sqrt_().add_(self.eps)
        values = torch.addcdiv(values, exp_avg / correction1, denominator, value=-rate)
        return values, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "touches": touches}
