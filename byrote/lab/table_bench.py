"""`byrote table bench`: how fast tables are, against what else there is. One thread.

A benchmark is a function Options -> rows, and stands in BENCHMARKS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from byrote.lab.file_bench import bench_files
from byrote.lab.gather_bench import bench_gather, bench_hash
from byrote.lab.ratios import Options, Row
from byrote.lab.step_bench import bench_step
from byrote.lab.update_bench import bench_update

BENCHMARKS: list[Callable[[Options], Iterator[Row]]] = [bench_gather, bench_hash, bench_update, bench_step]


def run(options: Options) -> Iterator[Row]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for benchmark in BENCHMARKS:
            yield from benchmark(options)
        if options.folder is not None:
            yield from bench_files(options)
            from byrote.lab.decode_bench import bench_decode

            yield from bench_decode(options)
    finally:
        torch.set_num_threads(threads)
