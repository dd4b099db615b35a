"""Fit Eq. 23 of DLCM, `law.Decay`: what the decay of the rate gains. A regression of logarithms,

    log((L_stable - L_decayed) / L_stable) = log k + a log L_stable + b log R + c log N + noise,

by ordinary least squares, with intervals of 95 % from Student's t. R^2 is that of the logarithms.
Exponents may have either sign. k stands at L = R = N = 1, far from any run, so that its interval is wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from byrote.lab.studies.dlcm_scaling.data import Decays
from byrote.lab.studies.dlcm_scaling.law import Decay
from byrote.lab.studies.statistics import student_t

NAMES = ("k", "a", "b", "c")


@dataclass(frozen=True, eq=False)
class DecayFit:
    """A fit of `Decay` to runs: the law, 95 % intervals of its four numbers, and the share of variance it explains."""

    runs: Decays
    decay: Decay
    intervals: dict[str, tuple[float, float]]
    r2: float

    @property
    def observed(self) -> np.ndarray:
        return (self.runs.stable - self.runs.decayed) / self.runs.stable

    @property
    def predicted(self) -> np.ndarray:
        return self.decay.reduction(self.runs.stable, self.runs.r, self.runs.n)


def fit_decay(runs: Decays) -> DecayFit:
    count = len(runs.n)
    if count <= len(NAMES):
        raise ValueError(f"{count} runs with a decayed_loss are too few for k, a, b and c: give at least 5")
    logs = np.log(np.stack([runs.stable, runs.r, runs.n]))
    for name, values, exponent in zip(("stable_loss", "R", "N"), logs, "abc", strict=True):
        if np.ptp(values) < 1e-9:
            raise ValueError(f"{name} is {np.exp(values[0]):g} in all runs: {exponent} cannot be told from k")
    middle = logs.mean(axis=1)
    design = np.stack([np.ones(count), *(logs - middle[:, None])], axis=1)  # centered: N alone is a column of twenties
    target = np.log((runs.stable - runs.decayed) / runs.stable)
    found, _, rank, _ = np.linalg.lstsq(design, target, rcond=1e-10)
    if rank < len(NAMES):
        raise ValueError("stable_loss, R and N move together in these runs: a, b and c cannot be told apart")
    shift = np.eye(len(NAMES))  # from the middle to L = R = N = 1
    shift[0, 1:] = -middle
    values, left = shift @ found, target - design @ found
    variance = left @ left / (count - len(NAMES))
    spread = shift @ np.linalg.inv(design.T @ design) @ shift.T * variance
    half = student_t(count - len(NAMES)) * np.sqrt(np.diag(spread))
    intervals = {name: (float(v - h), float(v + h)) for name, v, h in zip(NAMES, values, half, strict=True)}
    intervals["k"] = float(np.exp(intervals["k"][0])), float(np.exp(intervals["k"][1]))
    decay = Decay(k=float(np.exp(values[0])), a=float(values[1]), b=float(values[2]), c=float(values[3]))
    total = np.sum((target - target.mean()) ** 2)
    return DecayFit(runs, decay, intervals, float(1 - left @ left / total) if total else 1.0)
