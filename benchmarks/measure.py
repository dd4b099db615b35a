"""Side by side: named cases take turns in one process, so that a busy machine slows all of them.

A ratio is the median of the ratios of each turn, with the least and the greatest; seconds are medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Ratio:
    median: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.least:.2f}, {self.greatest:.2f}]"


def take_turns(cases: dict[str, Callable[[], Any]], turns: int) -> Times:
    """Seconds of each case in each turn. It runs once before it is timed: what the last one left in caches and in the
    allocator is not its own.
    """
    times: Times = {name: [] for name in cases}
    for _ in track(range(turns), f"{', '.join(cases)}: turns", console=Console(stderr=True), transient=True):
        for name, case in cases.items():
            case()
            _wait()
            began = time.perf_counter()
            case()
            _wait()
            times[name].append(time.perf_counter() - began)
    return times


def faster(times: Times, name: str, than: str) -> Ratio:
    """How many times as fast as `than` is `name`."""
    ratios = [a / b for a, b in zip(times[than], times[name], strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class Line:
    """A line of the report. `target` is a bound on the ratio's median: from below, or from above if `at_most`."""

    what: str
    measured: str
    ratio: Ratio | None = None
    target: float | None = None
    at_most: bool = False

    @property
    def verdict(self) -> str:
        if self.ratio is None or self.target is None:
            return ""
        met = self.ratio.median <= self.target if self.at_most else self.ratio.median >= self.target
        return f"{'at most' if self.at_most else 'at least'} {self.target:g}: {'met' if met else 'NOT met'}"


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--turns", type=int, default=9)
    made.add_argument("--quick", action="store_true", help="small and few: does it run?")
    made.add_argument("--json", type=Path, help="write the numbers here too")
    return made


def report(title: str, lines: list[Line], options: argparse.Namespace) -> None:
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    place = f"{where}, {options.dtype}, {options.threads} threads, torch {torch.__version__}"
    table = Table("", "median", "ratio [least, greatest]", "target", title=f"{title}\n{place}")
    for line in lines:
        table.add_row(line.what, line.measured, str(line.ratio or ""), line.verdict)
    Console(width=140).print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "title": title,
            "place": place,
            "lines": [asdict(line) | {"verdict": line.verdict} for line in lines],
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def median(times: list[float]) -> float:
    return statistics.median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
