"""Training: tokens a second of one optimizer step, everything on a batch of the same tokens.

    python benchmarks/training.py [--dtype bfloat16] [--compile] [--shape small|tiny|wide]

byrote's MoE against transformers' DeepseekV3, in each of its implementations of the experts, with the same weights and
the same AdamW; the Engram model against the MoE model of equal parameters; four residual streams against one. The step
of a model is forward, backward and `optimizer.step`, with byrote's optimizer where byrote's models are compared.

DeepseekV3 counts shared experts in widths of a routed one, so the shape that both can have is the preset small, or the
tiny recipe's with one shared expert of 64. Multi-token prediction is off.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from measure import Line, faster, median, parser, report, take_turns
from transformers import DeepseekV3ForCausalLM

from byrote import EngramConfig, EngramForCausalLM
from byrote.interop.deepseek_v3 import to_deepseek_v3
from byrote.interop.deepseek_v3_config import to_deepseek_v3_config
from byrote.train.allocator import keep_freed_memory
from byrote.train.evaluate import loss_options
from byrote.train.optimizer import Optimizer
from byrote.train.recipe import RECIPES, Recipe

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")  # of the experts, in transformers
SMALL = ("eager", "grouped_mm")  # batched_mm copies an expert's weights for every token
HYPER = "MoE, 4 streams, hyper-connections"
WIDE: dict[str, Any] = {"hidden_size": 512, "num_attention_heads": 8, "kv_lora_rank": 128, "moe_intermediate_size": 128}
WIDE |= {"intermediate_size": 1536, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}


def config(kind: str, shape: str, **overrides: Any) -> EngramConfig:
    """The model of a recipe, small-KIND or tiny-KIND, on raw token ids and with one residual stream."""
    settings = Recipe.load(RECIPES / f"{'small' if shape == 'small' else 'tiny'}-{kind}.toml").model
    wide = WIDE if shape == "wide" else {}
    return EngramConfig.from_preset(settings.preset, **{"num_streams": 1, **settings.overrides, **wide, **overrides})


def common_config(shape: str) -> EngramConfig:
    """A backbone that DeepseekV3Config can describe too."""
    if shape == "small":
        return EngramConfig.from_preset("small", num_streams=1, memory_layers=[])
    width = WIDE["moe_intermediate_size"] if shape == "wide" else 64
    return config("moe", shape, shared_expert_intermediate_size=width)


class Step:
    """One optimizer step of a model."""

    def __init__(self, model: Any, options: argparse.Namespace, optimizer: Callable[[Any], Any] = Optimizer) -> None:
        self.model = model.to(options.device).train()
        self.optimizer = optimizer(self.model)
        self.options = options
        self.extra = loss_options(model)
        self.forward = torch.compile(self.model) if options.compile else self.model
        shape = (2, 64) if options.quick else (options.batch, 256)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, model.config.vocab_size, shape, generator=generator).to(options.device)

    def __call__(self) -> None:
        with torch.autocast(self.options.device, torch.bfloat16, enabled=self.options.dtype == "bfloat16"):
            loss = self.forward(input_ids=self.ids, labels=self.ids, use_cache=False, **self.extra).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def against_transformers(options: argparse.Namespace) -> list[Line]:
    torch.manual_seed(0)
    shape = common_config(options.shape)
    ours = EngramForCausalLM(shape)
    cases = {"byrote": Step(ours, options, adamw)}
    names = SMALL if options.shape == "small" else IMPLEMENTATIONS
    for name in names:
        theirs = DeepseekV3ForCausalLM(to_deepseek_v3_config(shape))
        theirs.load_state_dict({k: v.clone() for k, v in stacked(ours, theirs).items()}, strict=False)
        theirs.set_experts_implementation(name)
        cases[name] = Step(theirs, options, adamw)
    with torch.no_grad():
        losses = {n: float(s.model(input_ids=s.ids, labels=s.ids, use_cache=False).loss) for n, s in cases.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses  # the same model
    times = take_turns(cases, options.turns)
    best = min(names, key=lambda name: median(times[name]))
    tokens = cases["byrote"].ids.numel()
    lines = [Line(f"transformers, {n}", f"{tokens / median(times[n]):,.0f} tokens/s") for n in names]
    bound = 1.0 if options.shape == "small" else 1.1
    target = bound if options.dtype == "float32" and not options.compile else None
    ratio = faster(times, "byrote", best)
    return [*lines, Line(f"byrote, against {best}", f"{tokens / median(times['byrote']):,.0f} tokens/s", ratio, target)]


def stacked(ours: EngramForCausalLM, theirs: DeepseekV3ForCausalLM) -> dict[str, torch.Tensor]:
    """Our weights under the names that transformers holds in memory: experts stacked."""
    released = to_deepseek_v3(ours)
    names = {name: value for name, value in released.items() if ".experts." not in name}
    for index, layer in enumerate(ours.model.layers):
        if index >= ours.config.first_k_dense_replace:
            prefix = f"model.layers.{index}.mlp.experts."
            experts = layer.experts.experts
            names |= {f"{prefix}gate_up_proj": experts.gate_up, f"{prefix}down_proj": experts.down}
    missing = theirs.state_dict().keys() - names.keys() - {"lm_head.weight"}
    assert not missing, missing
    return names


def against_the_backbone(options: argparse.Namespace) -> list[Line]:
    torch.manual_seed(0)
    configs = {
        "MoE": config("moe", options.shape),
        "Engram": config("engram", options.shape),
        "MoE, 4 streams": config("moe", options.shape, num_streams=4),
    }
    if options.shape != "small":  # a model of which takes 4 GB
        hyper = config("moe", options.shape, num_streams=4, stream_connection="hc")
        configs |= {"Engram, 4 streams": config("engram", options.shape, num_streams=4), HYPER: hyper}
    cases = {name: Step(EngramForCausalLM(made), options) for name, made in configs.items()}
    times = take_turns(cases, options.turns)
    tokens = cases["MoE"].ids.numel()
    speeds = {name: f"{tokens / median(times[name]):,.0f} tokens/s" for name in times}
    lines = [
        Line("byrote MoE", speeds["MoE"]),
        Line("Engram, against MoE", speeds["Engram"], faster(times, "Engram", "MoE"), 0.9),
        cost("MoE, 4 streams", "MoE", times, speeds, 1.25),
    ]
    others = {"Engram, 4 streams": "Engram", HYPER: "MoE"}
    return [*lines, *(cost(name, than, times, speeds) for name, than in others.items() if name in times)]


def cost(name: str, than: str, times: Any, speeds: dict[str, str], target: float | None = None) -> Line:
    return Line(f"{name}: cost against {than}", speeds[name], faster(times, than, name), target, at_most=True)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--compile", action="store_true", help="torch.compile every model")
    made.add_argument("--shape", choices=("small", "tiny", "wide"), default="small", help="hidden size 768, 128 or 512")
    made.add_argument("--batch", type=int, default=6, help="rows of 256 tokens")
    made.add_argument("--only", choices=("transformers", "backbone"), help="one half of the comparisons")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as `byrote train` does; for all that are compared
    if options.quick:
        options.turns = 2
    lines = [] if options.only == "backbone" else against_transformers(options)
    lines += [] if options.only == "transformers" else against_the_backbone(options)
    compiled = ", compiled" if options.compile else ""
    report(f"Training step, {options.shape} shape{compiled}", lines, options)


if __name__ == "__main__":
    main()
