"""Concept models whose every part matters, whose rows form concepts at different steps; and what each forward did."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

from byrote import DLCMConfig, DLCMForCausalLM
from byrote.nn.boundary import BoundaryHead
from byrote.nn.hyper import GatedExit, ManifoldConnection
from byrote.nn.router import Router

VOCABULARY = 64
LENGTH = 24
TOLERANCE = 1e-5
NEAR = 1e-5  # two computations may choose boundaries differently only where p is so near to the threshold

MEMORIES = {"memory_layers": [0, 1], "memory_table_sizes": [101, 211], "memory_initializer_range": 1.0}
DEEPSEEK = {
    **MEMORIES,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_streams": 3,
}

# The three forms with every option twice, not every combination of them.
VARIANTS = {
    "paper": {},
    "paper, open": {"boundary_convention": "open", "boundary_threshold": 0.6},
    "paper, uniform": {"concept_weighting": "uniform", "concept_smoothing": "none", "boundary_threshold": 0.6},
    "paper, rule": {
        "boundary_mode": "rule",
        "boundary_threshold": 0.3,
        "boundary_convention": "open",
        "concept_weighting": "uniform",
    },
    "memories": {**MEMORIES, "boundary_threshold": 0.6, "boundary_mode": "e2e"},
    "memories, open": {**MEMORIES, "boundary_convention": "open", "concept_smoothing": "none"},
    "deepseek": {**DEEPSEEK, "boundary_threshold": 0.6},
    "deepseek, open": {**DEEPSEEK, "boundary_convention": "open", "concept_weighting": "uniform"},
}

# Every option is in one of the others too.
SLOW = ("paper, uniform", "deepseek, open")


def build(seed: int = 0, **overrides) -> DLCMForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_encoder_layers": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "concept_size": 48,
        "num_concept_heads": 4,
        "num_concept_key_value_heads": 2,
        "concept_intermediate_size": 64,
        "boundary_size": 8,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **overrides,
    }
    model = DLCMForCausalLM(DLCMConfig.from_preset("dlcm-nano", **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gain" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "conv_weight" in name or "beginning" in name:
                parameter.normal_(0, 0.5)
        for module in model.modules():
            if isinstance(module, Router):
                module.selection_bias.normal_(0, 0.05)
            elif isinstance(module, ManifoldConnection | GatedExit):
                module.weight.normal_(0, 0.1)
                module.bias.add_(0.5 * torch.randn_like(module.bias))
                module.scale.fill_(0.5)
            elif isinstance(module, BoundaryHead) and module.scan_size:
                module.query.weight.normal_()
                module.key.weight.normal_()
    return model


@dataclass
class Run:
    """logits [B, T, V], probabilities and boundaries [B, T] of all forwards; and of each: the shape [R, M] that went
    through the concept transformer, (0, 0) where nothing did, and how many concepts of it were real.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    boundaries: torch.Tensor
    shapes: list[tuple[int, int]]
    concepts: list[int]


class Trace:
    """Collects a Run from every forward of a model while it is open."""

    def __init__(self, model: DLCMForCausalLM) -> None:
        self.model, self.parts, self.shapes, self.concepts, self.margins = model, [], [], [], []

    def __enter__(self) -> Trace:
        stage = self.model.model.concepts

        def begun(module, args):
            self.shapes.append((0, 0))
            self.concepts.append(0)

        def thought(module, args):
            self.shapes[-1] = tuple(args[0].shape[:2])
            self.concepts[-1] = int(args[3].alive.sum())

        def routed(module, args, output):
            scores = (output[2] + module.selection_bias).sort(dim=-1, descending=True).values
            self.margins.append((scores[..., module.top_k - 1] - scores[..., module.top_k]).min())

        def done(module, args, output):
            self.parts.append((output.logits, output.boundary_probabilities, output.boundaries))

        self.hooks = [
            stage.register_forward_pre_hook(begun),
            stage.layers[-1].register_forward_pre_hook(thought),
            self.model.register_forward_hook(done),
        ]
        self.hooks += [m.register_forward_hook(routed) for m in self.model.modules() if isinstance(m, Router)]
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()
        assert all(margin > 1e-6 for margin in self.margins), "a routing margin is too small: choose another seed"

    def run(self) -> Run:
        logits, p, boundaries = (torch.cat(parts, dim=1) for parts in zip(*self.parts, strict=True))
        return Run(logits, p, boundaries, self.shapes, self.concepts)


@torch.no_grad()
def full_forward(model, ids, **kwargs) -> Run:
    with Trace(model) as trace:
        model(input_ids=ids, use_cache=False, **kwargs)
    return trace.run()


@torch.no_grad()
def in_chunks(model, ids, sizes, cache=None, *, boundaries=None, positions=None, masked=False):
    """(Run over chunks of the given sizes, cache)"""
    cache = DynamicCache(config=model.config) if cache is None else cache
    at = 0
    with Trace(model) as trace:
        for size in sizes:
            chunk = slice(at, at + size)
            model(
                input_ids=ids[:, chunk],
                past_key_values=cache,
                boundaries=None if boundaries is None else boundaries[:, chunk],
                position_ids=None if positions is None else positions[:, chunk],
                attention_mask=ids.new_ones(len(ids), at + size) if masked else None,
            )
            at += size
    assert at == ids.shape[1]
    return trace.run(), cache


def assert_same_boundaries(model, ours, p, theirs) -> None:
    different = ours != theirs
    if different.any():
        worst = (p - model.config.boundary_threshold).abs()[different].max()
        assert worst < NEAR, f"boundaries differ {worst:.1e} away from the threshold: {different.nonzero().tolist()}"
        raise AssertionError("a probability lies too near to the threshold to compare: choose another seed")


def assert_same(model, ours: Run, theirs: Run, kept=slice(None)) -> None:
    """Boundaries first: what follows a wrong one is wrong anyhow. `kept`: which tokens of `theirs` ours are."""
    assert_same_boundaries(model, ours.boundaries, theirs.probabilities[:, kept], theirs.boundaries[:, kept])
    torch.testing.assert_close(ours.probabilities, theirs.probabilities[:, kept], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours.logits, theirs.logits[:, kept], atol=TOLERANCE, rtol=0)


def state_of(cache):
    return cache.layers[-1]


@pytest.fixture(scope="module", params=[pytest.param(v, marks=pytest.mark.slow if v in SLOW else ()) for v in VARIANTS])
def built(request):
    return build(**VARIANTS[request.param])


@pytest.fixture
def ids():
    """Three rows of 24 tokens with repeats, so that n-grams recur."""
    return torch.randint(3, 20, (3, LENGTH), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def forced():
    """Boundaries for them: between none and two a row among the last five, and everything else by chance."""
    boundaries = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.35
    boundaries[:, -5:] = False
    boundaries[1, -3] = boundaries[2, -5] = boundaries[2, -2] = True
    return boundaries
