"""A large table in host memory beside a dense model on a GPU: tokens a second, against the same model without a memory.

    python benchmarks/pinned.py --device cuda --dtype bfloat16 [--billions 32] [--codec int8] [--profile]

The backbone is the paper's dense one of 4 B parameters (`--preset`), with random weights. The tables have `--billions`
of parameters in two layers, in 8 bits; their rows repeat, their addresses do not. On a GPU they are pinned
(placement="pinned"): a kernel there reads them over the bus. Prefill: rows of 1,024 tokens. Decode: one token at a
time, of one row and of 32, behind 256 tokens. The Engram paper (section 6.4, table 4) reports -1.9 % and -2.8 % of
throughput for a table of 100 B beside models of 4 B and 8 B.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from decode import Decode
from measure import Line, Times, faster, median, parser, report, take_turns
from torch import Tensor

from byrote import EngramConfig, EngramForCausalLM
from byrote.tables import RamTable
from byrote.tables.placements.pinned import PinnedTable

GOAL = 0.99


class Repeated(RamTable):
    """Rows that are the same every 65,536: as many bytes to read, drawn in seconds."""

    def pieces(self) -> Iterator[Tensor]:
        if self.drawn:
            yield from super().pieces()
            return
        values = torch.randn(min(self.num_rows, 1 << 16), self.width, generator=torch.Generator().manual_seed(0))
        piece = self._codec.encode(values * self._std).view(self._codec.dtype)
        for at in range(0, self.num_rows, len(piece)):
            yield piece[: self.num_rows - at]


class RepeatedPinned(Repeated, PinnedTable):
    pass


def prefill(model: Any, rows: int, tokens: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), generator=generator).to(model.device)

    @torch.no_grad()
    def run() -> Any:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return run


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--preset", default="dense-4b", help="of EngramConfig; made dense")
    made.add_argument("--billions", type=float, default=32.0, help="parameters of both tables together")
    made.add_argument("--codec", default="int8", choices=("int8", "fp8", "int4", "bf16", "fp32"))
    made.add_argument("--profile", action="store_true", help="show where the time of a decoded token goes")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.preset, options.billions, options.turns = "tiny", 0.01, 2
    lines = measure(options)
    report(f"{options.preset} and {options.billions:g} B parameters of table in {options.codec}", lines, options)


def measure(options: argparse.Namespace) -> list[Line]:
    models = {"none": build(options, layers=[]), "table": build(options, layers=[1, 2 if options.quick else 14])}
    began = time.perf_counter()
    place_tables(models["table"], options)
    filled = time.perf_counter() - began
    tables = [memory.table for _, memory in models["table"].memory_stack.items()]
    size = sum(table.stats()["bytes"] for table in tables)
    kind = "pinned" if isinstance(tables[0], PinnedTable) else "in RAM"
    lines = [
        Line("parameters of the backbone", f"{sum(p.numel() for p in models['none'].parameters()) / 1e9:.2f} B"),
        Line(f"tables, {kind}", f"{size / 1e9:.1f} GB, made in {filled:.0f} s"),
    ]
    rows, context, tokens = ((1, 2), 16, 4) if options.quick else ((1, 32), 256, 32)
    cases: dict[str, tuple[int, Callable[[Any], Callable[[], Any]]]] = {}
    for number in rows:
        cases[f"prefill, {number} x {4 * context} tokens"] = (
            number * 4 * context,
            lambda model, number=number: prefill(model, number, 4 * context),
        )
        cases[f"decode, {number} rows"] = (
            number * tokens,
            lambda model, number=number: Decode(model, context, tokens, options.device, number),
        )
    for what, (count, make) in cases.items():
        times = take_turns({name: make(model) for name, model in models.items()}, options.turns)
        lines.append(line(what, count, times, None if options.quick else GOAL))
    if options.profile:
        profile(Decode(models["table"], context, tokens, options.device, rows[-1]), options.device)
    return lines


def line(what: str, count: int, times: Times, goal: float | None) -> Line:
    each = {name: f"{count / median(seconds):,.0f}" for name, seconds in times.items()}
    return Line(what, f"{each['table']} of {each['none']} tokens/s", faster(times, "table", "none"), goal)


def build(options: argparse.Namespace, layers: list[int]) -> Any:
    """On its device from the beginning; its tables come to be when they are first read."""
    preset = EngramConfig.from_preset(options.preset)
    size = 1e9 * options.billions / 2 / (preset.memory_row_width * preset.memory_heads * 2)  # rows a head
    config = EngramConfig.from_preset(
        options.preset,
        first_k_dense_replace=preset.num_hidden_layers,
        memory_layers=layers,
        memory_table_sizes=[math.ceil(size)] * 2,
        memory_codec=options.codec,
    )
    with torch.device(options.device):
        torch.manual_seed(0)
        return EngramForCausalLM(config).to(options.device, getattr(torch, options.dtype)).eval()


def place_tables(model: Any, options: argparse.Namespace) -> None:
    kind = RepeatedPinned if options.device == "cuda" else Repeated
    for _, memory in model.memory_stack.items():
        old = memory.table
        memory.table = kind(old.num_rows, old.width, digest=old.digest, codec=old.codec)
        memory.table.read(torch.zeros(1, dtype=torch.int64))


def profile(case: Callable[[], Any], device: str) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    case()
    with torch.profiler.profile(activities=activities) as made:
        case()
    order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(made.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50))


if __name__ == "__main__":
    main()
