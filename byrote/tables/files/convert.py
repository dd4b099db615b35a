"""A table written anew in another codec, piece by piece: memory does not follow its size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from byrote.tables.codecs import CODECS, chance
from byrote.tables.files.format import header_of, stream
from byrote.tables.table import Table

PIECE_BYTES = 4 << 20  # of rows in float32
# The worst error of a value, as the docstring of `codecs.py` derives it; `Codec.bound` is the same as a number.
BOUNDS = {
    "fp32": "none",
    "bf16": "2^-8 of the largest value of its row",
    "bf16-stochastic": "2^-7 of the largest value of its row",
    "fp8": "2^-4 of the largest of its 32 values",
    "int8": "1/253 of the largest value of its row",
    "int4": "1/13.9 of the largest value of its row",
}


@dataclass(frozen=True)
class Conversion:
    """`worst`: the largest error of a value; `share`: the largest part of its bound that an error took; `rms`: the
    root mean square of all errors over that of all values.
    """

    codec: str
    bytes_before: int
    bytes_after: int
    worst: float
    share: float
    rms: float


def convert(
    source: Table, target: Path, codec: str, report: Callable[[int, int], None] = lambda done, total: None
) -> Conversion:
    """Write the rows of `source`, with its digest and generation, to a file of ours."""
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {codec!r}")
    if target.exists():
        raise ValueError(f"{target} is there already: choose another name")
    to, seen, squares = CODECS[codec], {"worst": 0.0, "share": 0.0}, torch.zeros(2, dtype=torch.float64)
    size, generator = to.record_bytes(source.width), chance(source.digest, source.generation)

    def pieces() -> Iterator[Tensor]:
        step = max(1, PIECE_BYTES // (4 * source.width))
        for begin in range(0, source.num_rows, step):
            end = min(begin + step, source.num_rows)
            values = source.read(torch.arange(begin, end))
            try:
                records = to.encode(values, generator)
            except ValueError as error:
                raise ValueError(f"rows {begin} to {end - 1}: {error}") from None
            errors = (to.decode(records, source.width) - values).abs_()
            worst, bounds = errors.amax(1), to.bound(values)
            seen["worst"] = max(seen["worst"], float(worst.max()))
            seen["share"] = max(seen["share"], float((worst / bounds).nan_to_num(0.0).max()))  # 0 / 0: no error
            norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in (errors, values)]
            squares.add_(torch.stack(norms).square())
            report(end, source.num_rows)
            yield records.view(to.dtype)

    header = header_of(source) | {"codec": codec}
    shape = (source.num_rows, size // to.dtype.itemsize)
    target.parent.mkdir(parents=True, exist_ok=True)
    stream(target, {"rows": (to.dtype, shape, pieces)}, header)
    rms = float((squares[0] / squares[1]).nan_to_num(0.0).sqrt())
    before = source.stats()["bytes"]
    return Conversion(codec, before, source.num_rows * size, seen["worst"], seen["share"], rms)
