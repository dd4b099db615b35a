"""What a handful of seeds can tell: means, spreads, paired differences, each with a 95 % interval (Student's t).

    mean +- t(n - 1) sd / sqrt(n),   sd with n - 1

A paired difference is the same of x_i - y_i, where run i of both saw the same seed: the order of the data and the
initial weights, as far as the models share them, cancel. Of one value there is a mean and no more: sd and half are nan.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of n values, with half the width of the interval of the mean (Student's t)."""

    n: int
    mean: float
    sd: float
    half: float  # of the interval: mean - half .. mean + half


def summarize(values: Sequence[float], level: float = LEVEL) -> Summary:
    if not values:
        raise ValueError("values is empty: give at least one")
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Summary(1, mean, math.nan, math.nan)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Summary(n, mean, sd, student_t(n - 1, level) * sd / math.sqrt(n))


def paired(values: Mapping[int, float], baseline: Mapping[int, float], level: float = LEVEL) -> Summary | None:
    """values less baseline over the seeds that both have; None if there are none."""
    seeds = sorted(values.keys() & baseline.keys())
    return summarize([values[seed] - baseline[seed] for seed in seeds], level) if seeds else None


def student_t(degrees: int, level: float = LEVEL) -> float:
    """The t with P(-t < T < t) = level for Student's distribution with so many degrees of freedom."""
    if degrees < 1:
        raise ValueError(f"degrees={degrees}: give at least 1, which takes two values")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: give a probability between 0 and 1")
    return float(stdtrit(degrees, (1 + level) / 2))
