"""DLCM against a plain model of the same FLOPs a token: training, cached decoding, bytes of the cache; attention.

    python benchmarks/dlcm.py [--shape tiny|small] [--only training decoding attention]

Boundaries are forced, one in R = 4 tokens at random places, so that both models do what they were matched for whatever
their weights. Decoding feeds tokens one by one behind a context: rows of a batch close concepts at different steps.
Attention: tokens to concepts by replicated keys, by a mask, by FlexAttention, at the paper's four lengths (table 6).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from measure import Line, Times, faster, median, parser, report, take_turns
from torch import Tensor
from transformers import DynamicCache

from byrote import DLCMConfig, DLCMForCausalLM
from byrote.memory.concept_state import ConceptState
from byrote.models.counts import count
from byrote.nn.concept_attention import Places, flex, replicated, sdpa

RATIO = 4
PARTS = ("training", "decoding", "attention")


class Step:
    """Forward and backward over a batch."""

    def __init__(self, model: Any, batch: dict[str, Tensor], dtype: str) -> None:
        self.model, self.batch, self.dtype = model.train(), batch, dtype

    def __call__(self) -> None:
        self.model.zero_grad()
        device = self.batch["input_ids"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = self.model(**self.batch, use_cache=False, skip_logits=True).loss
        loss.backward()


class Decode:
    """`tokens` forwards of one token each behind `context` tokens; every call starts from the same cache."""

    def __init__(self, model: Any, rows: int, context: int, tokens: int, device: str) -> None:
        self.model, self.context, self.tokens = model, context, tokens
        generator = torch.Generator().manual_seed(0)
        shape = (rows, context + tokens)
        self.ids = torch.randint(3, model.config.vocab_size, shape, generator=generator).to(device)
        self.boundaries = boundaries(shape, generator).to(device)
        self.cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for at in range(0, context, 256):
                self._feed(self.cache, at, min(at + 256, context))

    def _feed(self, cache: DynamicCache, begin: int, end: int) -> Tensor:
        forced = {"boundaries": self.boundaries[:, begin:end]} if self.model.config.num_concept_layers else {}
        return self.model(input_ids=self.ids[:, begin:end], past_key_values=cache, logits_to_keep=1, **forced).logits

    @torch.no_grad()
    def __call__(self) -> Tensor:
        cache = again(self.cache)
        for at in range(self.context, self.context + self.tokens):
            logits = self._feed(cache, at, at + 1)
        return logits

    @property
    def bytes_per_token(self) -> float:
        *layers, state = self.cache.layers
        keys = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return (keys + state.nbytes) / (len(self.ids) * self.context)


def boundaries(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """In each row exactly one token in R, at random."""
    order = torch.rand(shape, generator=generator).argsort(dim=1)
    return order < shape[1] // RATIO


def again(cache: DynamicCache) -> DynamicCache:
    """The cache as it is, without a copy of what is only appended to."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    state = copied.layers[-1]
    assert isinstance(state, ConceptState)
    state.tails = {name: tail.clone() for name, tail in state.tails.items()}
    state.slots = dict(state.slots)
    if "document" in state.slots:
        state.slots["document"] = state.slots["document"].clone()
    return copied


def pair(shape: str, options: argparse.Namespace, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    configs = {name: DLCMConfig.from_preset(f"{name}-{shape}") for name in ("llama", "dlcm")}
    return {name: DLCMForCausalLM(config).to(options.device, dtype) for name, config in configs.items()}


def training(options: argparse.Namespace) -> list[Line]:
    models = pair(options.shape, options)
    rows, length = (2, 32) if options.quick else (6, 256)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, models["dlcm"].config.vocab_size, (rows, length), generator=generator)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length).expand(rows, -1)}
    batch = {name: tensor.to(options.device) for name, tensor in batch.items()}
    forced = {"boundaries": boundaries((rows, length), generator).to(options.device)}
    cases = {
        "llama": Step(models["llama"], batch, options.dtype),
        "dlcm": Step(models["dlcm"], batch | forced, options.dtype),
    }
    flops = {name: count(model.config, length).flops_per_token for name, model in models.items()}
    times = take_turns(cases, options.turns)
    speed = {name: f"{rows * length / median(seconds):,.0f} tokens/s" for name, seconds in times.items()}
    return [
        Line(f"training, llama: {flops['llama']:,} FLOPs a token", speed["llama"]),
        Line(f"training, dlcm: {flops['dlcm']:,}", speed["dlcm"], faster(times, "dlcm", "llama"), 0.9),
    ]


def decoding(options: argparse.Namespace) -> list[Line]:
    models = pair(options.shape, options, getattr(torch, options.dtype))
    models = {name: model.eval() for name, model in models.items()}
    lines = []
    contexts, tokens = ((8, 32), 4) if options.quick else ((256, 4096), 16)
    for rows in (1, 8):
        for context in contexts:
            cases = {name: Decode(model, rows, context, tokens, options.device) for name, model in models.items()}
            times = take_turns(cases, options.turns)
            each = {name: f"{1e3 * median(seconds) / tokens:.2f} ms" for name, seconds in times.items()}
            what = f"decoding, {rows} row{'s' if rows > 1 else ''} behind {context}"
            lines.append(Line(f"{what}, llama", each["llama"]))
            target = 1.1 if rows == 1 else None
            lines.append(Line(f"{what}, dlcm", each["dlcm"], faster(times, "dlcm", "llama"), target))
    sizes = {name: case.bytes_per_token for name, case in cases.items()}
    share = f"{sizes['dlcm']:,.0f} of {sizes['llama']:,.0f} ({sizes['dlcm'] / sizes['llama'] - 1:+.0%})"
    return [*lines, Line(f"bytes of cache a token, 8 rows behind {contexts[1]}", share)]


def attention(options: argparse.Namespace) -> list[Line]:
    """Forward alone: FlexAttention has no backward on a CPU."""
    lines = []
    for length in (64,) if options.quick else (2048, 4096, 8192, 16384):
        generator = torch.Generator().manual_seed(0)
        shape = (1, 32, length, 32)
        query, key, value = (
            torch.randn(shape, generator=generator, dtype=getattr(torch, options.dtype)) for _ in "qkv"
        )
        at = boundaries((1, length), generator)[0]
        at[0] = True
        places = torch.arange(length)[None], at.nonzero().T
        where = Places(torch.zeros_like(places[0]), places[0], torch.zeros_like(places[1]), places[1])
        concepts = int(at.sum())
        query, key, value = (x.to(options.device) for x in (query, key[:, :, :concepts], value[:, :, :concepts]))
        where = Places(*(x.to(options.device) for x in vars(where).values()))
        cases: dict[str, Callable[[], Tensor]] = {
            "replicated": lambda q=query, k=key, v=value, w=where: replicated(q, k, v, w),  # type: ignore[misc]
            "mask": lambda q=query, k=key, v=value, w=where: sdpa(q, k, v, w, "replicated"),  # type: ignore[misc]
            "flex": lambda q=query, k=key, v=value, w=where: flex(q, k, v, w, "replicated"),  # type: ignore[misc]
        }
        with torch.no_grad():
            times: Times = take_turns(cases, min(options.turns, 3))
        for name, seconds in times.items():
            ratio = None if name == "flex" else faster(times, name, "flex")
            lines.append(
                Line(f"attention, {length} tokens, {name} against flex", f"{1e3 * median(seconds):.1f} ms", ratio)
            )
    return lines


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shape", choices=("tiny", "small"), default="tiny", help="hidden size 128 or 768")
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    options.turns = 2 if options.quick else options.turns
    parts = {"training": training, "decoding": decoding, "attention": attention}
    lines = [line for name in options.only for line in parts[name](options)]
    report(f"DLCM, {options.shape} shape", lines, options)


if __name__ == "__main__":
    main()
