"""Runs to fit the scaling laws of DLCM to: a CSV file with a header, or a JSON list of objects; one run a line.

    N  D  R  P  loss                       for the law (Eq. 22): parameters, tokens, tokens a concept, share of the
                                           parameters that lies in the concept layers, validation loss
    N  R  stable_loss  decayed_loss        for the decay (Eq. 23): losses without and with the decay of the schedule

A file may have both. Other columns are left alone. A run without a loss, or without the two losses, is left out of that
law. Several points of one training are several lines with the same N, R and P.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

LAW = ("N", "D", "R", "P", "loss")
DECAY = ("N", "R", "stable_loss", "decayed_loss")


@dataclass(frozen=True, eq=False)
class Runs:
    """Each [runs], float64."""

    n: np.ndarray
    d: np.ndarray
    r: np.ndarray
    p: np.ndarray
    loss: np.ndarray

    def __post_init__(self) -> None:
        _check({"N": self.n, "D": self.d, "R": self.r, "P": self.p, "loss": self.loss})
        for i in np.flatnonzero((self.p <= 0) | (self.p >= 1)):
            raise ValueError(
                f"run {i + 1} has P={self.p[i]:g}: it is the share of parameters in the concept layers, "
                "between 0 and 1 and neither"
            )


@dataclass(frozen=True, eq=False)
class Decays:
    """Each [runs], float64."""

    n: np.ndarray
    r: np.ndarray
    stable: np.ndarray
    decayed: np.ndarray

    def __post_init__(self) -> None:
        _check({"N": self.n, "R": self.r, "stable_loss": self.stable, "decayed_loss": self.decayed})
        for i in np.flatnonzero(self.decayed >= self.stable):
            raise ValueError(
                f"run {i + 1} has decayed_loss={self.decayed[i]:g}, not below its stable_loss={self.stable[i]:g}: "
                "a reduction of nothing has no logarithm; check the run, or leave it out"
            )


def read_runs(path: Path) -> tuple[Runs | None, Decays | None]:
    """What the columns of the file are enough for; ValueError where that is nothing."""
    records = _records(path)
    if not records:
        raise ValueError(f"{path} holds no run")
    has = list(dict.fromkeys(name for record in records for name in record))
    of_decay = bool({"stable_loss", "decayed_loss"} & set(has))
    law = _columns(path, records, has, LAW, ("loss",)) if "loss" in has or not of_decay else None
    decay = _columns(path, records, has, DECAY, ("stable_loss", "decayed_loss")) if of_decay else None
    runs, decays = Runs(*law) if law else None, Decays(*decay) if decay else None
    if runs is None and decays is None:
        raise ValueError(f"{path} has no run with a loss")
    return runs, decays


def _records(path: Path) -> list[dict[str, Any]]:
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"{path}: runs are read from .csv (with a header) or .json (a list of objects)")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                return list(csv.DictReader(file, skipinitialspace=True))
        content = json.loads(path.read_text("utf-8"))
    except (csv.Error, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not {'CSV' if path.suffix == '.csv' else 'JSON'}: {error}") from None
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise ValueError(f'{path}: give a list of objects, [{{"N": ..., "D": ..., "R": ..., "P": ..., "loss": ...}}]')
    return content


def _columns(
    path: Path, records: list[dict[str, Any]], has: list[str], names: tuple[str, ...], losses: tuple[str, ...]
) -> list[np.ndarray] | None:
    """A column for each name, of the runs that have any of the losses; None where no run has."""
    for name in names:
        if name not in has:
            near = get_close_matches(name.lower(), [str(other).lower() for other in has], n=1)
            like = next((f"; is it {other!r}?" for other in has if near and str(other).lower() == near[0]), "")
            raise ValueError(f"{path} has no column {name!r}, but {', '.join(map(str, has))}{like}")
    rows = []
    for number, record in enumerate(records, 1):
        if any(record.get(name) not in (None, "") for name in losses):
            rows.append([_number(path, number, name, record.get(name)) for name in names])
    return list(np.array(rows, np.float64).T) if rows else None


def _number(path: Path, number: int, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{path}, run {number}: {name} is {value!r}; give a number") from None


def _check(columns: dict[str, np.ndarray]) -> None:
    for name, values in columns.items():
        for i in np.flatnonzero(~np.isfinite(values)):
            raise ValueError(f"run {i + 1} has {name}={values[i]}: leave it out, or give a finite number")
        for i in np.flatnonzero(values <= 0):
            raise ValueError(f"run {i + 1} has {name}={values[i]:g}: it must be above 0")
    for i in np.flatnonzero(columns["R"] < 1):
        raise ValueError(f"run {i + 1} has R={columns['R'][i]:g}: a concept has at least 1 token")
