"""Ratios of times, measured in one run: what the rows of `byrote table bench` are made of.

The candidates are called in turn, round after round (`interleaved`), so that what else the machine does hits them
alike; the ratio of a round is the time of the best rival over our time, and a row holds median and range of the ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """`folder`: where the large file is made and deleted again; None: files are not measured. `fbgemm`: a Python that
    has FBGEMM; None: not measured.
    """

    quick: bool = False
    rounds: int = 15
    folder: Path | None = None
    fbgemm: Path | None = None


@dataclass(frozen=True)
class Row:
    """`ratios`: how many times as fast as the rival, a round each. `target`: the least median; None: a report.

    `limit`: the ratios are our time over the other's, and their median is at most this.
    """

    what: str
    against: str
    ours_ms: float
    theirs_ms: float
    ratios: tuple[float, ...]
    target: float | None = None
    limit: float | None = None

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        if self.limit is not None:
            return self.ratio <= self.limit
        return None if self.target is None else self.ratio >= self.target

    def to_dict(self) -> dict[str, Any]:
        spread = {"ratio": self.ratio, "lowest": min(self.ratios), "highest": max(self.ratios), "met": self.met}
        return {**self.__dict__, "ratios": list(self.ratios), **spread}


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, after one call of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, call in candidates.items():
            began = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compare(
    what: str, seconds: dict[str, list[float]], ours: str, rivals: list[str], against: str, target: float | None
) -> Row:
    best = [min(times) for times in zip(*(seconds[name] for name in rivals), strict=True)]
    ratios = tuple(theirs / own for theirs, own in zip(best, seconds[ours], strict=True))
    return Row(what, against, 1e3 * statistics.median(seconds[ours]), 1e3 * statistics.median(best), ratios, target)


def at_most(
    what: str, seconds: dict[str, list[float]], ours: str, other: str, against: str, limit: float | None
) -> Row:
    """What something costs, as a multiple of `other`."""
    ratios = tuple(own / theirs for own, theirs in zip(seconds[ours], seconds[other], strict=True))
    own, theirs = (1e3 * statistics.median(seconds[name]) for name in (ours, other))
    return Row(what, against, own, theirs, ratios, limit=limit)
