"""Compiled loops of layers: what each gains alone, in the step that it serves.

    python benchmarks/loops.py [--shape small|tiny] [--only train|decode]

The same step with a loop and with its plain twin in its place, in turn, in CPU seconds of the process: a ratio is plain
over loop, the median of the pairs. A loop that gains less than 5 % at `small` is not worth its code. Decoding is one
row behind 2,048 tokens, a pair of tokens a turn; training is a batch of 256 tokens in one row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from measure import Line, faster, median, parser, report
from training import Step
from transformers import DynamicCache

from byrote import EngramConfig, EngramForCausalLM
from byrote.ops.dispatch import plain_twins

# The loops that a step of so many streams takes.
DECODING = {1: ("mixture",), 4: ("mixture", "connect")}
TRAINING = {4: ("connect",)}


def pairs(step: Callable[[], Any], loop: str, turns: int) -> dict[str, list[float]]:
    """CPU seconds of a step with the loop and without, each first every second time."""
    times: dict[str, list[float]] = {"loop": [], "plain": []}
    for turn in range(turns + 1):
        for case in ("loop", "plain") if turn % 2 else ("plain", "loop"):
            with plain_twins(loop) if case == "plain" else nullcontext():
                began = time.process_time()
                step()
                if turn:  # the first compiles, and fills the caches
                    times[case].append(time.process_time() - began)
    return times


def decoder(model: Any, context: int) -> Callable[[], Any]:
    """A step that decodes the next token of one row, and goes on."""
    model.eval()
    ids = torch.randint(3, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    @torch.no_grad()
    def step() -> None:
        model(input_ids=ids[:, cache.get_seq_length() % context, None], past_key_values=cache)

    return step


def line(what: str, loop: str, times: dict[str, list[float]]) -> Line:
    return Line(f"{what}: {loop}", f"{1e3 * median(times['loop']):.2f} ms", faster(times, "loop", "plain"), 1.05)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shape", choices=("small", "tiny"), default="small")
    made.add_argument("--only", choices=("train", "decode"))
    options = made.parse_args()
    options.batch = 1
    torch.set_num_threads(options.threads)
    lines = []
    for streams in (1, 4):
        torch.manual_seed(0)
        model = EngramForCausalLM(EngramConfig.from_preset(options.shape, num_streams=streams))
        if options.only != "train":
            step = decoder(model, 64 if options.quick else 2048)
            turns = 2 if options.quick else 8 * options.turns
            lines += [
                line(f"decoding, {streams} streams", loop, pairs(step, loop, turns)) for loop in DECODING[streams]
            ]
        if options.only != "decode":
            options.compile = False
            train, turns = Step(model, options), 1 if options.quick else options.turns
            for loop in TRAINING.get(streams, ()):
                lines.append(line(f"training, {streams} streams", loop, pairs(train, loop, turns)))
    report(f"Loops alone, {options.shape} shape", lines, options)


if __name__ == "__main__":
    main()
