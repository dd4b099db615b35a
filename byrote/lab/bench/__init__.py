"""How fast tables are, against what else there is: `byrote table bench`. One thread.

A benchmark is a function Options -> rows, and stands in BENCHMARKS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from byrote.lab.bench.files import bench_files
from byrote.lab.bench.gather import bench_gather, bench_hash
from byrote.lab.bench.ratios import Options, Row
from byrote.lab.bench.step import bench_step
from byrote.lab.bench.update import bench_update

BENCHMARKS: list[Callable[[Options], Iterator[Row]]] = [bench_gather, bench_hash, bench_update, bench_step]


def run(options: Options) -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for benchmark in BENCHMARKS:
            yield from benchmark(options)
        if options.folder is not None:
            yield from bench_files(options)
            from byrote.lab.bench.decode import bench_decode

            yield from bench_decode(options)
    finally:
        torch.set_num_threads(threads)
