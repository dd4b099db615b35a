"""How fast tables are, against what else there is: rows of `byrote table bench`, each a ratio measured in one run.

A benchmark is a function Options -> rows, and stands in BENCHMARKS. It calls the candidates in turn, round after round
(`interleaved`), so that what else the machine does hits them alike; the ratio of a round is the time of the best rival
over our time, and a row holds the median and the range of the ratios. One thread.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from byrote.address import engram, hash_rows, windows
from byrote.memory import Memory
from byrote.memory.lookup import gather as lookup_gather
from byrote.tables import LazyAdam, RamTable, RowAdagrad, RowRule
from byrote.tables.gather import gather
from byrote.tables.rules import update_rows

C_LOOP = """
#include <stdint.h>
#include <string.h>
void gather(const char *records, const int64_t *ids, int64_t count, char *out) {
    for (int64_t i = 0; i < count; i++) {
        if (i + 24 < count) {
            const char *next = records + ids[i + 24] * 160;
            __builtin_prefetch(next); __builtin_prefetch(next + 64);
            __builtin_prefetch(next + 128); __builtin_prefetch(next + 159);
        }
        memcpy(out + i * 160, records + ids[i] * 160, 160);
    }
}
"""


@dataclass(frozen=True)
class Options:
    """`folder`: where the large file is made and deleted again; None: files are not measured."""

    quick: bool = False
    rounds: int = 15
    folder: Path | None = None


@dataclass(frozen=True)
class Row:
    """`ratios`: how many times as fast as the rival, a round each. `target`: the least median; None: a report."""

    what: str
    against: str
    ours_ms: float
    theirs_ms: float
    ratios: tuple[float, ...]
    target: float | None = None

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
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


def bench_gather(options: Options) -> Iterator[Row]:
    """160-byte rows out of a table that no cache holds, into memory that is there already."""
    num_rows = (2 if options.quick else 20) * 10**6
    table = torch.zeros(num_rows, 40).add_(torch.arange(40.0))  # written, so that every page is there
    records, generator = table.view(torch.uint8), torch.Generator().manual_seed(0)
    for count, name in ((1 << 16, "64 k"), (1 << 20, "1 M")):
        ids = torch.randint(0, num_rows, (count,), generator=generator)
        out = torch.zeros(count, 40)
        places = [ctypes.c_void_p(records.data_ptr()), ctypes.c_void_p(ids.data_ptr()), ctypes.c_int64(count)]
        calls: dict[str, Callable[[], Any]] = {
            "byrote": partial(gather, records, ids, out.view(torch.uint8)),
            "torch.index_select": partial(torch.index_select, table, 0, ids, out=out),
            "np.take": partial(np.take, table.numpy(), ids.numpy(), 0, out=out.numpy(), mode="clip"),
        }
        with tempfile.TemporaryDirectory() as folder:
            if loop := _c_loop(Path(folder)):
                calls["C"] = partial(loop, *places, ctypes.c_void_p(out.data_ptr()))
            seconds = interleaved(calls, options.rounds)
        what = f"gather {name} rows of 160 bytes, table of {num_rows * 160 / 1e9:.1f} GB"
        rivals = ["torch.index_select", "np.take"]
        yield compare(what, seconds, "byrote", rivals, "the better of torch.index_select and np.take", 2.0)
        if "C" in seconds:
            yield compare(what, seconds, "byrote", ["C"], "a C loop with prefetch", 0.95)


def bench_hash(options: Options) -> Iterator[Row]:
    """From the compressed ids of 4,096 tokens to their rows: 2 orders, 8 heads, rows of 64."""
    classes, pad = 50_000, 2
    spec = engram(
        np.arange(classes),
        table_sizes=[(20_000 if options.quick else 250_000)] * 2,
        heads=8,
        layer_ids=[1],
        pad_id=pad,
        max_order=3,
    )
    layer = spec.layers[0]
    table = RamTable(layer.rows, 64, digest=spec.digest)
    ids = torch.randint(0, classes, (8, 512), generator=torch.Generator().manual_seed(0))
    starts = torch.zeros_like(ids, dtype=torch.bool)

    def ours() -> Tensor:
        return table.read(hash_rows(windows(ids, starts, None, 3), layer, pad))

    def demo() -> Tensor:
        return F.embedding(torch.from_numpy(demo_rows(ids.numpy(), layer, pad)), table.rows)

    assert torch.equal(ours(), demo())
    seconds = interleaved({"byrote": ours, "demo": demo}, options.rounds)
    what = f"hash and gather 4,096 tokens x 16 columns, table of {table.stats()['bytes'] / 1e9:.1f} GB"
    yield compare(what, seconds, "byrote", ["demo"], "the demo's NumPy recipe and F.embedding", 5.0)


def demo_rows(ids: np.ndarray, layer: Any, pad: int) -> np.ndarray:
    """Row ids as the Engram demo's code computes them (`_get_ngram_hashes`): a NumPy pass for each head."""
    tokens, columns = ids.shape[1], []
    shifted = [
        np.pad(ids, ((0, 0), (back, 0)), constant_values=pad)[:, :tokens] for back in range(len(layer.multipliers))
    ]
    for order in range(2, len(layer.multipliers) + 1):
        mix = shifted[0] * layer.multipliers[0]
        for back in range(1, order):
            mix = np.bitwise_xor(mix, shifted[back] * layer.multipliers[back])
        columns += [(mix % prime).astype(np.int64, copy=False) for prime in layer.primes[order - 2]]
    return np.stack(columns, 2) + np.array(layer.offsets)


def bench_update(options: Options) -> Iterator[Row]:
    """Lookup, backward and update of 32,768 random rows; each round takes other rows, the same for all."""
    num_rows = (400 if options.quick else 4000) * 1000
    what = f"lookup, backward, update of 32,768 rows, table of {num_rows / 1e6:g} M x 64: "
    for rival in ("sparse", "dense"):
        steps: dict[str, Callable[[], None]] = {
            "adam": _table_step(num_rows, LazyAdam()),
            "adagrad": _table_step(num_rows, RowAdagrad()),
            rival: _embedding_step(num_rows, sparse=rival == "sparse"),
        }
        seconds = interleaved(steps, options.rounds)
        if rival == "sparse":
            against = "nn.Embedding(sparse=True) and SparseAdam"
            yield compare(what + "LazyAdam", seconds, "adam", [rival], against, 5.0)
            yield compare(what + "RowAdagrad", seconds, "adagrad", [rival], against, None)
        else:
            yield compare(what + "LazyAdam", seconds, "adam", [rival], "nn.Embedding and fused AdamW", None)


def _random_rows(num_rows: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randint(0, num_rows, (32_768,), generator=generator)


def _table_step(num_rows: int, rule: RowRule) -> Callable[[], None]:
    memory, draw, weight = Memory(RamTable(num_rows, 64, digest="")), _random_rows(num_rows), torch.randn(32_768, 64)

    def step() -> None:
        lookup_gather(memory.anchor, draw(), memory.lookup.handle).backward(weight)
        taken = memory.lookup.pending.take()
        assert taken is not None
        update_rows(memory.table, rule, *taken, 1e-3)

    return step


def _embedding_step(num_rows: int, sparse: bool) -> Callable[[], None]:
    embedding, draw, weight = (
        torch.nn.Embedding(num_rows, 64, sparse=sparse),
        _random_rows(num_rows),
        torch.randn(32_768, 64),
    )
    optimizer: torch.optim.Optimizer = (
        torch.optim.SparseAdam(embedding.parameters(), lr=1e-3)
        if sparse
        else torch.optim.AdamW(embedding.parameters(), lr=1e-3, fused=True)
    )

    def step() -> None:
        embedding(draw()).backward(weight)
        optimizer.step()
        optimizer.zero_grad()

    return step


def state_bytes() -> list[dict[str, Any]]:
    """Bytes of optimizer state after every row of a small table was touched, less the directory of 4 bytes a row."""
    sizes = []
    for name, rule, unit, target in (
        ("LazyAdam", LazyAdam(), 64, "8 bytes a touched parameter, and 4 a touched row for its clock"),
        ("RowAdagrad", RowAdagrad(), 1, "4 bytes a touched row"),
    ):
        table = RamTable(1 << 14, 64, digest="")
        update_rows(table, rule, torch.arange(1 << 14), torch.ones(1 << 14, 64), 1e-3)
        stats = table.stats()
        held = (stats["state_bytes"] - 4 * stats["num_rows"]) / (stats["rows_touched"] * unit)
        sizes.append({"rule": name, "bytes": held, "of each": "parameter" if unit > 1 else "row", "target": target})
    return sizes


BENCHMARKS: list[Callable[[Options], Iterator[Row]]] = [bench_gather, bench_hash, bench_update]


def run(options: Options) -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for benchmark in BENCHMARKS:
            yield from benchmark(options)
        if options.folder is not None:
            from byrote.lab.file_bench import bench_files

            yield from bench_files(options)
            from byrote.lab.decode_bench import bench_decode

            yield from bench_decode(options)
    finally:
        torch.set_num_threads(threads)


def _c_loop(folder: Path) -> Callable[..., None] | None:
    """The C loop, compiled for this machine; None where there is no compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source, library = folder / "gather.c", folder / "gather.so"
    source.write_text(C_LOOP)
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)]
    if subprocess.run(command, capture_output=True).returncode:
        return None
    loop = ctypes.CDLL(str(library)).gather
    loop.restype = None
    return loop
