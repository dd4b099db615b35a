"""Rows out of a table in RAM: rows of `byrote table bench`.

gather   160-byte rows into memory that is there already, against torch.index_select, np.take and a C loop
hash     from the compressed ids of 4,096 tokens to their rows, against the Engram demo's NumPy recipe
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from byrote.address import engram, hash_rows, windows
from byrote.lab.bench.ratios import Options, Row, compare, interleaved
from byrote.tables import RamTable
from byrote.tables.host_memory import ask_for_huge_pages
from byrote.tables.records import gather

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


def bench_gather(options: Options) -> Iterator[Row]:
    """160-byte rows out of a table that no cache holds, into memory that is there already."""
    num_rows = (2 if options.quick else 20) * 10**6
    table = torch.empty(num_rows, 40)
    ask_for_huge_pages(table)  # as a RamTable does; the rivals read the same memory
    table.copy_(torch.arange(40.0))
    for count, name in ((1 << 16, "64 k"), (1 << 20, "1 M")):
        seconds = _gather_seconds(table, count, options.rounds)
        what = f"gather {name} rows of 160 bytes, table of {num_rows * 160 / 1e9:.1f} GB"
        rivals = ["torch.index_select", "np.take"]
        yield compare(what, seconds, "byrote", rivals, "the better of torch.index_select and np.take", 2.0)
        if "C" in seconds:
            yield compare(what, seconds, "byrote", ["C"], "a C loop with prefetch", 0.95)


def _gather_seconds(table: Tensor, count: int, rounds: int) -> dict[str, list[float]]:
    generator, out = torch.Generator().manual_seed(0), torch.zeros(count, table.shape[1])
    # Other ids at each call: the caches hold the rows of the call before.
    ids = itertools.cycle([torch.randint(0, len(table), (count,), generator=generator) for _ in range(9)])
    records, values, rows = table.view(torch.uint8), table.numpy(), out.numpy()
    first, length, into = ctypes.c_void_p(table.data_ptr()), ctypes.c_int64(count), ctypes.c_void_p(out.data_ptr())
    calls: dict[str, Callable[[], Any]] = {
        "byrote": lambda: gather(records, next(ids), out.view(torch.uint8)),
        "torch.index_select": lambda: torch.index_select(table, 0, next(ids), out=out),
        "np.take": lambda: np.take(values, next(ids).numpy(), 0, out=rows, mode="clip"),
    }
    with tempfile.TemporaryDirectory() as folder:
        if loop := _c_loop(Path(folder)):
            calls["C"] = lambda: loop(first, ctypes.c_void_p(next(ids).data_ptr()), length, into)
        return interleaved(calls, rounds)


def bench_hash(options: Options) -> Iterator[Row]:
    """From the compressed ids of 4,096 tokens to their rows: 2 orders, 8 heads, rows of 64."""
    classes, pad = 50_000, 2
    spec = engram(
        np.arange(classes),
        table_sizes=[(20_000 if options.quick else 250_000)] * 2,
        heads=8,
        layer_ids=[1],
        pad_id=pad,
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
