"""Run this library against vectors that another engine wrote, and say where the two part.

A vector file holds cases; a case holds quantities, compared in the order in which an engine computes them. A
case stops at its first divergence, so the place that is named is the cause and not an effect. Integers must
be equal; floats must be within

    2e-6 max(1, |expected|) + 4 r,   r = the largest distance, along the last axis, of our float32 and float64

because some values have fewer digits than float32 shows: the square root in the gate magnifies a rounding
error near s = 0 some 500-fold, in the vectors as in us.

What needs a tokenizer that is not installed is not compared, and the report says so. The formats are in
docs/formats.md; `conformance_hash.py` and `conformance_forward.py` read them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TOLERANCE = 2e-6


class FormatError(ValueError):
    """The file cannot be read as vectors."""


def naming_the_file(check: Callable[[Path], Iterator[Case]]) -> Callable[[Path], Iterator[Case]]:
    """So that each FormatError of a check says of which file it is."""

    @functools.wraps(check)
    def named(path: Path) -> Iterator[Case]:
        try:
            yield from check(path)
        except FormatError as error:
            raise FormatError(str(error) if str(path) in str(error) else f"{path}: {error}") from error

    return named


class Divergence(Exception):
    """The first place where expected and computed values differ."""


@dataclass
class Case:
    """What became of one case: quantities compared, what could not be compared, and where it diverged.

    A case of which nothing can be compared has failed, unless it is `optional`: then it counts neither way.
    """

    name: str
    optional: bool = False
    compared: int = 0
    unchecked: list[str] = field(default_factory=list)
    divergence: str | None = None

    @property
    def passed(self) -> bool:
        return self.divergence is None and self.compared > 0

    @property
    def failed(self) -> bool:
        return self.divergence is not None or (self.compared == 0 and not self.optional)

    def line(self) -> str:
        verdict = "FAIL" if self.failed else "pass" if self.passed else "skip"
        found = self.divergence or (f"{self.compared} quantities agree" if self.compared else "nothing to check")
        return f"{verdict}  {self.name}: " + "; not checked: ".join([found, *self.unchecked])

    def exact(self, what: str, expected: Any, got: Any, axes: Sequence[str] = ()) -> None:
        """Integers; `axes` names the dimensions for the report."""
        expected, got = np.asarray(expected), _array(got)
        _same_shape(what, expected, got)
        _report(what, expected != got, expected, got, axes)
        self.compared += 1

    def close(
        self,
        what: str,
        expected: Any,
        got: Any,
        axes: Sequence[str],
        noise: Any = 0.0,
        tolerance: float = TOLERANCE,
    ) -> None:
        """Floats; `noise` broadcasts over them."""
        expected, got = _array(expected), _array(got)
        _same_shape(what, expected, got)
        allowed = tolerance * np.maximum(1.0, np.abs(expected)) + noise
        _report(what, ~(np.abs(expected - got) <= allowed), expected, got, axes)
        self.compared += 1


def run_case(name: str, check: Callable[[Case], None], *, optional: bool = False) -> Case:
    case = Case(name, optional)
    try:
        check(case)
    except Divergence as divergence:
        case.divergence = str(divergence)
    except KeyError as error:
        raise FormatError(f"{name} lacks {error}") from error
    except (AttributeError, IndexError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise FormatError(f"{name} is malformed: {error}") from error
    return case


def check_version(name: Any, expected: str, version: Any) -> None:
    """`name` is the file's `format`, as NAME/VERSION or as NAME beside a `format_version`."""
    family, _, suffix = str(name).partition("/")
    versions = {str(found) for found in (suffix or None, version) if found is not None}
    wanted_family, _, wanted_version = expected.partition("/")
    if family != wanted_family or versions != {wanted_version}:
        raise FormatError(f"format is {name!r} with format_version {version!r}; this command reads {expected}")


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach()
        return values.double().numpy() if values.is_floating_point() else values.numpy()
    return np.asarray(values)


def _same_shape(what: str, expected: np.ndarray, got: np.ndarray) -> None:
    if expected.shape != got.shape:
        raise Divergence(f"{what}: expected shape {list(expected.shape)}, got {list(got.shape)}")


def _report(what: str, differs: np.ndarray, expected: np.ndarray, got: np.ndarray, axes: Sequence[str]) -> None:
    if not differs.any():
        return
    index = tuple(int(i) for i in np.argwhere(differs)[0])
    place = ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True))
    where = f"{what} at {place}" if place else what
    count = f" ({int(differs.sum())} of {differs.size} differ)" if differs.size > 1 else ""
    raise Divergence(f"{where}: expected {expected[index]}, got {got[index]}{count}")
