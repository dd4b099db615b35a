"""What a handful of seeds can tell: means, spreads, paired differences, each with a 95 % interval (Student's t).

    mean +- t(n - 1) sd / sqrt(n),   sd with n - 1

A paired difference is the same of x_i - y_i, where run i of both saw the same seed: the order of the data and the
initial weights, as far as the models share them, cancel. Of one value there is a mean and no more: sd and half are nan.

t is exact for whole degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4), found by bisection.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
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


@lru_cache
def student_t(degrees: int, level: float = LEVEL) -> float:
    """The t with P(-t < T < t) = level for Student's distribution with so many degrees of freedom."""
    if degrees < 1:
        raise ValueError(f"degrees={degrees}: give at least 1, which takes two values")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: give a probability between 0 and 1")
    low, high = 0.0, 1.0
    while two_sided(high, degrees) < level:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if two_sided(middle, degrees) < level else (low, middle)
    return high


def two_sided(t: float, degrees: int) -> float:
    """P(-t < T < t)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
