"""Does decoupled muP hold for a DLCM? The coordinate check over token and over concept widths, and a sweep of rates.

    token      token width base, 2, 4 and 8 times it; concepts stay at twice the base
    concept    concept width likewise; tokens stay at the base
    both       tokens at the base and 4 times it, concepts twice as wide: the sweep, on text

each with muP (`mup_base_width` = base, `Optimizer(mup=MuP())`) and without. Heads keep their size and grow in number,
the inner width of the experts is 3 times the outer one. The check trains on one batch of uniformly random tokens, with
a boundary every 4 tokens: concepts are as many at every width, and none is padding. The sweep chooses its boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from byrote.data.packing import Packer, Tokens
from byrote.lab.studies.mup.coordinates import Batches, Coordinates, coordinates
from byrote.lab.studies.mup.transfer import Transfer, transfer
from byrote.models.dlcm import DLCMConfig, DLCMForCausalLM
from byrote.train.mup import MuP
from byrote.train.optimizer import Optimizer

STAGES = {
    "embedding": "model.embed_tokens",
    "encoder attention": "model.encoder.0.attention",
    "encoder experts": "model.encoder.0.experts",
    "up": "model.concepts.up",
    "concept attention": "model.concepts.layers.1.attention",
    "concept experts": "model.concepts.layers.1.experts",
    "read": "model.concepts.read",
    "decoder experts": "model.decoder.0.experts",
    "logits": "lm_head",
}
FACTORS = (1, 2, 4, 8)
HEAD = 16  # of attention


@dataclass(frozen=True)
class Options:
    """What the check runs: narrowest width, rate, steps, seed, and the batches of random tokens. ValueError on odd
    widths.
    """

    base: int = 64
    rate: float = 5e-3
    steps: int = 10
    seed: int = 0
    rows: int = 8
    length: int = 64
    vocab_size: int = 256

    def __post_init__(self) -> None:
        if self.base < 2 * HEAD or self.base % (2 * HEAD):
            raise ValueError(f"base is {self.base}; give a multiple of {2 * HEAD}, which is two heads of attention")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give at least 1")
        if not self.rate > 0:
            raise ValueError(f"rate is {self.rate}; give one above 0")


def check(options: Options, varied: str, mup: bool) -> Coordinates:
    """`varied`: "token" or "concept"."""
    assert varied in ("token", "concept")
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(options.vocab_size, (options.rows, options.length), generator=generator)
    boundaries = torch.zeros_like(ids, dtype=torch.bool)
    boundaries[:, ::4] = True
    batch = {"input_ids": ids, "labels": ids, "boundaries": boundaries}

    def make(width: int) -> tuple[nn.Module, Batches]:
        token, concept = (width, 2 * options.base) if varied == "token" else (options.base, width)
        return _model(options, token, concept, mup, options.vocab_size), lambda step: batch

    widths = [factor * options.base for factor in FACTORS]
    return coordinates(make, widths, STAGES, lambda model: optimizer(model, options.rate, mup), options.steps)


def sweep(options: Options, data: Path, vocab_size: int, steps: int, rates: list[float], mup: bool) -> Transfer:
    """On a corpus that `byrote data` prepared."""
    tokens = Tokens.open(data, "train")

    def make(width: int) -> tuple[nn.Module, Batches]:
        packer = Packer(tokens, options.rows, options.length, options.seed)
        return _model(options, width, 2 * width, mup, vocab_size), packer.batch

    widths = [options.base, 4 * options.base]
    return transfer(make, widths, rates, lambda model, rate: optimizer(model, rate, mup), steps)


def optimizer(model: nn.Module, rate: float, mup: bool) -> torch.optim.Optimizer:
    return Optimizer(model, rate, weight_decay=0.0, mup=MuP() if mup else None)


def _model(options: Options, token: int, concept: int, mup: bool, vocab_size: int) -> DLCMForCausalLM:
    torch.manual_seed(options.seed)  # of the weights, and of the boundaries that training draws
    config = DLCMConfig(
        vocab_size=vocab_size,
        hidden_size=token,
        num_attention_heads=token // HEAD,
        num_key_value_heads=token // HEAD // 2,
        head_dim=HEAD,
        intermediate_size=3 * token,
        concept_size=concept,
        num_concept_heads=concept // HEAD,
        num_concept_key_value_heads=concept // HEAD // 2,
        concept_intermediate_size=3 * concept,
        mup_base_width=options.base if mup else None,
    )
    return DLCMForCausalLM(config)
