"""What the size of a table costs a training step: rows of `byrote table bench`.

The demo's model (preset `tiny`, rows of 16) with tables of 16 million rows a layer, and with tables of 64 thousand.
Both take the same batches of 6 x 256 random tokens, a new one each round, so the ids are the same hashes modulo other
primes: hardly a row of the large table is met twice. Steps in turns; float32, one thread.

    step     forward, backward and `optimizer.step`
    table    what of it is the tables': reads, sums of row gradients, row updates. Timed inside the step, where the
             caches are full of other things
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from byrote.lab.bench.ratios import Options, Row, at_most
from byrote.models.engram import EngramConfig, EngramForCausalLM
from byrote.train.optimizer import Optimizer

SIZES = {"large": 2_000_000, "small": 8_000}  # rows a head: 2 orders x 4 heads make 16 M and 64 k
QUICK = {"large": 200_000, "small": 8_000}
SHAPE = 6, 256


def bench_step(options: Options) -> Iterator[Row]:
    sizes = QUICK if options.quick else SIZES
    steps = {name: Step(size) for name, size in sizes.items()}
    whole: dict[str, list[float]] = {name: [] for name in steps}
    table: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + WARM):
        for name, step in steps.items():
            seconds, share = step()
            if number >= WARM:
                whole[name].append(seconds)
                table[name].append(share)
    large, small = (f"{8 * size / 1000:,.0f} k" for size in (sizes["large"], sizes["small"]))
    what, against = f"one training step of tiny, tables of {large} rows: ", f"{small} rows"
    limits = (None, None) if options.quick else (2.0, 1.3)  # a small table's rows stay in the caches
    yield at_most(what + "the tables' share", table, "large", "small", against, limits[0])
    yield at_most(what + "the step", whole, "large", "small", against, limits[1])


WARM = 3  # rounds that do not count: memory is met for the first time


class Step:
    """One optimizer step of the model with `rows` rows a head -> its seconds, and the tables' share of them."""

    def __init__(self, rows: int) -> None:
        torch.manual_seed(0)
        self.model = EngramForCausalLM(EngramConfig.from_preset("tiny", memory_table_sizes=[rows, rows])).train()
        self.optimizer = Optimizer(self.model)
        self.generator = torch.Generator().manual_seed(0)
        self.share = 0.0
        assert self.model.memory_stack is not None
        for _, memory in self.model.memory_stack.items():
            pending, held = memory.lookup.pending, memory.table
            for place, name in ((held, "read"), (held, "update"), (pending, "add"), (pending, "sum")):
                setattr(place, name, self._timed(getattr(place, name)))
            held.read(torch.zeros(1, dtype=torch.int64))  # drawn before the clock runs

    def __call__(self) -> tuple[float, float]:
        ids = torch.randint(3, self.model.config.vocab_size, SHAPE, generator=self.generator)
        self.share, began = 0.0, time.perf_counter()
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began, self.share

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.share += time.perf_counter() - began

        return timed
