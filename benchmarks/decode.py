"""Decoding: seconds a token behind a long context, one row, the same weights.

    python benchmarks/decode.py [--shape small|tiny|wide]

byrote reads the latents as they lie in the cache (absorbed attention); transformers' DeepseekV3 expands all of them at
every step. A context of random tokens fills the cache, then tokens are fed one by one: the forward alone, without
`generate`, whose own cost is the last line.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from measure import Line, faster, median, parser, report, take_turns
from training import common_config, config, stacked
from transformers import DeepseekV3ForCausalLM, DynamicCache

from byrote import EngramConfig, EngramForCausalLM
from byrote.interop.deepseek_v3_config import to_deepseek_v3_config


class Decode:
    """`tokens` forwards of one token a row, behind `context` tokens; every call starts from the same cache."""

    def __init__(self, model: Any, context: int, tokens: int, device: str, rows: int = 1) -> None:
        self.model, self.tokens = model, tokens
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, model.config.vocab_size, (rows, context + tokens), generator=generator).to(device)
        self.cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=self.ids[:, :context], past_key_values=self.cache, logits_to_keep=1)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        cache = copy.deepcopy(self.cache)
        for at in range(self.ids.shape[1] - self.tokens, self.ids.shape[1]):
            logits = self.model(input_ids=self.ids[:, at : at + 1], past_key_values=cache).logits
        return logits


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shape", choices=("small", "tiny", "wide"), default="small", help="hidden size 768, 128 or 512")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    contexts, tokens = ((8, 64), 4) if options.quick else ((64, 2048), 20)
    options.turns = 2 if options.quick else options.turns
    report(f"Decoding, {options.shape} shape", measure(options, contexts, tokens), options)


def measure(options: argparse.Namespace, contexts: tuple[int, int], tokens: int) -> list[Line]:
    torch.manual_seed(0)
    shape = common_config(options.shape)
    ours, theirs = EngramForCausalLM(shape), DeepseekV3ForCausalLM(to_deepseek_v3_config(shape))
    theirs.load_state_dict(stacked(ours, theirs), strict=False)
    dtype = getattr(torch, options.dtype)
    models = {"byrote": ours, "transformers": theirs}
    memory = EngramConfig.from_preset("small", num_streams=1) if options.shape == "small" else None
    models["byrote Engram"] = EngramForCausalLM(memory or config("engram", options.shape))
    models = {name: model.to(options.device, dtype).eval() for name, model in models.items()}
    cases = {
        f"{name} {context}": Decode(model, context, tokens, options.device)
        for name, model in models.items()
        for context in contexts
    }
    short, long = contexts
    if options.dtype == "float32":
        torch.testing.assert_close(cases[f"byrote {long}"](), cases[f"transformers {long}"](), atol=1e-3, rtol=0)
    times = take_turns(cases, options.turns)
    each = {name: f"{1e3 * median(seconds) / tokens:.2f} ms/token" for name, seconds in times.items()}
    against = faster(times, f"byrote {long}", f"transformers {long}")
    return [
        *(Line(f"transformers, context {context}", each[f"transformers {context}"]) for context in contexts),
        Line(f"byrote, context {short}", each[f"byrote {short}"]),
        Line(f"byrote, context {long}, against transformers", each[f"byrote {long}"], against, 2.5),
        cost(f"byrote {long}", f"byrote {short}", times, each, 1.5),
        cost(f"byrote Engram {long}", f"byrote Engram {short}", times, each, 1.5),
        cost(f"byrote Engram {long}", f"byrote {long}", times, each),
    ]


def cost(name: str, than: str, times: Any, each: dict[str, str], target: float | None = None) -> Line:
    return Line(f"{name}: cost against {than}", each[name], faster(times, than, name), target, at_most=True)


if __name__ == "__main__":
    main()
