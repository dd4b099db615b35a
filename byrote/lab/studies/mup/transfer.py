"""Does the best learning rate of a narrow model hold for a wide one? A sweep over widths x rates, in this process.

A loss is the mean over the last quarter of the steps, infinite if the training left the finite numbers. `shift` is how
many steps of the grid lie between the best rates of the narrowest and the widest model: muP promises 0, and 1 is the
grid's own doubt. For sweeps of whole recipes there is `byrote lab run`; this is the small one beside
`byrote.lab.studies.mup.coordinates`.

Shapes: losses [widths, rates].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from torch import nn

from byrote.lab.studies.mup.coordinates import Make, train_step

MakeOptimizer = Callable[[nn.Module, float], torch.optim.Optimizer]  # model, rate


@dataclass(frozen=True, eq=False)
class Transfer:
    """Final losses of a sweep, float64 [widths, rates]."""

    widths: list[int]
    rates: list[float]
    losses: np.ndarray

    @property
    def best(self) -> list[float]:
        """The best rate of each width."""
        return [self.rates[i] for i in self.losses.argmin(axis=1)]

    @property
    def shift(self) -> int:
        """Of the widest model against the narrowest; negative where wide models want lower rates."""
        ends = self.losses[[int(np.argmin(self.widths)), int(np.argmax(self.widths))]].argmin(axis=1)
        return int(ends[1] - ends[0])

    @property
    def at_an_end(self) -> bool:
        """Is a best rate the lowest or the highest of the grid? Then the true one may lie beyond."""
        return any(rate in (self.rates[0], self.rates[-1]) for rate in self.best)


def transfer(
    make: Make, widths: Sequence[int], rates: Sequence[float], optimizer: MakeOptimizer, steps: int
) -> Transfer:
    """Train a new model for each width and rate."""
    if steps < 1 or not widths or sorted(set(rates)) != list(rates) or not rates:
        raise ValueError(
            f"steps is {steps}, widths {list(widths)}, rates {list(rates)}: give some, the rates ascending"
        )
    losses = np.array([[_train(make, width, rate, optimizer, steps) for rate in rates] for width in widths])
    if not np.isfinite(losses).any(axis=1).all():
        raise ValueError(f"no rate of {list(rates)} trains every width of {list(widths)}: give lower rates")
    return Transfer(list(widths), list(rates), losses)


def _train(make: Make, width: int, rate: float, optimizer: MakeOptimizer, steps: int) -> float:
    model, batches = make(width)
    model.train()
    updates, losses = optimizer(model, rate), []
    for step in range(steps):
        losses.append(train_step(model, batches(step), updates))
        if not math.isfinite(losses[-1]):
            return math.inf
    return fmean(losses[-max(1, steps // 4) :])
