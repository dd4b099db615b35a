"""How many rows must a cache hold? Hits against rows cached, per n-gram order, on real text.

The tokens of a corpus pass through the addresses of a memory as in a forward: documents apart, `batch` tokens at a
time, each row counted once a batch. The first half warms the cache up, the second is counted. For each order and size:

    hits   share of a batch's rows that byrote.tables.placements.cache_slots would have had
    best   the same for the rows that the second half reads most, known beforehand and never changed: a bound on what
           any choice of a fixed set of rows could do

Sizes are in rows of one order (all its heads); `distinct` of them were read at all. What a cache saves when it is
larger than that is nothing more: the rest are first reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from byrote.address.hashing import canonical_ids, hash_windows, windows
from byrote.address.spec import AddressSpec, LayerAddress
from byrote.data.packing import Tokens
from byrote.tables.placements.cache_slots import WAYS, Places


@dataclass(frozen=True)
class Curve:
    """Of one order: sizes [S] in rows; hits and best [S], shares of `reads`; rows read at all, in both halves."""

    order: int
    sizes: list[int]
    hits: list[float]
    best: list[float]
    reads: int
    distinct: int


def cache_curves(
    spec: AddressSpec,
    layer: LayerAddress,
    vocabulary: np.ndarray,
    tokens: Tokens,
    *,
    batch: int = 64,
    most: int = 1_000_000,
    points: int = 9,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Curve]:
    """One curve an order, over the first `most` tokens. `report(batches done, batches)`."""
    if batch < 1 or points < 2:
        raise ValueError(f"batch is {batch} and points {points}; give at least 1 and 2")
    count = min(most, len(tokens)) // (2 * batch) * 2
    if count < 2:
        raise ValueError(f"{min(most, len(tokens))} tokens are less than two batches of {batch}; lower the batch")
    rows = list(_rows(spec, layer, vocabulary, tokens, batch, count))
    curves = []
    for order in range(2, spec.max_order + 1):
        columns = slice((order - 2) * spec.heads, (order - 1) * spec.heads)
        reads = [np.unique(part[:, columns]) for part in rows]
        curves.append(_curve(order, reads, points, lambda done: report(done, count * (spec.max_order - 1))))
    return curves


def _rows(
    spec: AddressSpec, layer: LayerAddress, vocabulary: np.ndarray, tokens: Tokens, batch: int, count: int
) -> Iterator[np.ndarray]:
    """Row ids [batch, columns] of each batch in turn."""
    starts = np.zeros(len(tokens), bool)
    starts[tokens.offsets[:-1]] = True
    behind = spec.max_order - 1
    for at in range(0, count * batch, batch):
        before = max(0, at - behind)
        place = slice(before, at + batch)
        ids = canonical_ids(vocabulary, np.asarray(tokens.tokens[place], np.int64)[None])
        window = windows(ids, starts[None, place], None, spec.max_order)[:, at - before :]
        yield hash_windows(window, layer, spec.pad_id)[0]


def _curve(order: int, reads: list[np.ndarray], points: int, report: Callable[[int], None]) -> Curve:
    half = len(reads) // 2
    counted = np.concatenate(reads[half:])
    distinct = len(np.unique(np.concatenate(reads)))
    frequency = np.sort(np.unique(counted, return_counts=True)[1])[::-1].cumsum() / len(counted)
    largest = max(distinct, 2 * WAYS)
    sizes = sorted({int(size) for size in np.geomspace(max(WAYS, largest / 1000), largest, points)})
    hits, best = [], []
    for i, size in enumerate(sizes):
        places, found = Places(size), 0
        for number, rows in enumerate(reads):
            inside = places.find(rows).places >= 0
            found += int(inside.sum()) if number >= half else 0
            places.admit(rows[~inside])
        hits.append(found / len(counted))
        best.append(float(frequency[min(size, len(frequency)) - 1]))
        report(((order - 2) * len(sizes) + i + 1) * len(reads) // len(sizes))
    return Curve(order, sizes, hits, best, len(counted), distinct)


def save_curves(curves: list[Curve], folder: Path, title: str) -> None:
    """hit_rates.json and hit_rates.png."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hit_rates.json").write_text(json.dumps([asdict(curve) for curve in curves], indent=2) + "\n")
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(curves):
        color = f"C{index}"
        axes.plot(curve.sizes, curve.hits, color=color, marker="o", ms=4, label=f"{curve.order}-grams")
        axes.plot(curve.sizes, curve.best, color=color, lw=1, ls="--")
    axes.plot([], [], color="gray", ls="--", lw=1, label="best fixed set, known beforehand")
    axes.set_xscale("log")
    axes.set_ylim(0, 1)
    axes.set_xlabel("rows cached (log)")
    axes.set_ylabel("share of the reads that hit")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(folder / "hit_rates.png")
