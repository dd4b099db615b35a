"""How large a model is, and what a token costs it, counted from the modules built on the meta device.

total: all parameters, and the numbers in tables. active: those that one token uses. Of the tables these are the rows it
reads; of routed experts, those that it visits; of the embedding the one row that is read, unless the embedding is tied
to the head, which multiplies by all of it. Modules of multi-token prediction are in neither number, but in
`prediction`: without them it is the same model.

flops_per_token: forward and backward, 6 per weight of a matrix product that the token takes part in (2 forward, 4
backward), plus attention over an average causal context of half of `sequence_length`. Reading a row costs none.
Prediction modules are trained with the rest and counted here, each with its own pass through the head. What a DLCM does
once a concept counts 1 / R, and it attends to T / 2R concepts; smoothing, pooling and norms are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from byrote.models.configuration import MemoryConfig
from byrote.models.dlcm import DLCMConfig, DLCMForCausalLM
from byrote.models.engram import EngramConfig, EngramForCausalLM
from byrote.models.families import Config


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, and floating-point operations of training on one token."""

    total: int
    active: int
    table: int
    experts: int
    prediction: int
    flops_per_token: int


def count(config: Config, sequence_length: int = 256) -> Counts:
    """Count what `config` describes; nothing is allocated."""
    if isinstance(config, EngramConfig):
        return _count_engram(config, sequence_length)
    return _count_dlcm(config, sequence_length)


def block_macs(config: DLCMConfig) -> float:
    """Multiply-accumulates per token in the matrices of all blocks, those of concepts once in R tokens: what the paper
    matches in its table 3.
    """
    with torch.device("meta"):
        model = DLCMForCausalLM(config).model
    tokens = _matrices(model.encoder) + _matrices(model.decoder)
    if model.concepts is None:
        return tokens
    idle = _idle(config, _experts(model.concepts.named_parameters()))
    return tokens + (_matrices(model.concepts.layers) - idle) / config.compression_ratio


def _count_engram(config: EngramConfig, sequence_length: int) -> Counts:
    with torch.device("meta"):
        model = EngramForCausalLM(config)
    table = _table(config)
    read = len(config.memory_layers) * config.memory_size
    anchors = len(config.memory_layers)
    modules = dict(model.model.mtp.named_parameters())
    trunk = {name: p for name, p in model.named_parameters() if not name.startswith("model.mtp.")}
    backbone = sum(p.numel() for p in trunk.values()) - anchors
    experts = _experts(trunk.items())
    active = backbone - _idle(config, experts) - _unread(config)
    matrices = active - _small(trunk) + anchors
    prediction = sum(p.numel() for p in modules.values())
    matrices += prediction - _idle(config, _experts(modules.items())) - _small(modules)
    matrices += config.num_nextn_predict_layers * config.vocab_size * config.hidden_size
    attention = (
        (config.num_hidden_layers + config.num_nextn_predict_layers)
        * config.num_attention_heads
        * (sequence_length // 2)
        * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    )
    return Counts(
        total=backbone + table,
        active=active + read,
        table=table,
        experts=experts,
        prediction=prediction,
        flops_per_token=6 * (matrices + attention),
    )


def _count_dlcm(config: DLCMConfig, sequence_length: int) -> Counts:
    with torch.device("meta"):
        model = DLCMForCausalLM(config)
    table = _table(config)
    memories = len(config.memory_layers)
    dense = sum(p.numel() for p in model.parameters()) - memories  # without the anchors
    experts = _experts(model.named_parameters())
    matrices = block_macs(config) + config.vocab_size * config.hidden_size + _bridge(model, config)
    return Counts(
        total=dense + table,
        active=dense - _idle(config, experts) - _unread(config) + memories * config.memory_size,
        table=table,
        experts=experts,
        prediction=0,
        flops_per_token=round(6 * (matrices + _attention(config, sequence_length))),
    )


def _table(config: MemoryConfig) -> int:
    spec = config.spec
    return sum(layer.rows for layer in spec.layers) * config.memory_row_width if spec else 0


def _unread(config: Config) -> int:
    return 0 if config.tie_word_embeddings else (config.vocab_size - 1) * config.hidden_size


def _experts(parameters: Iterable[tuple[str, nn.Parameter]]) -> int:
    return sum(p.numel() for name, p in parameters if ".experts.experts." in name)


def _idle(config: Config, experts: int) -> int:
    """Of the routed experts' parameters, those that a token does not visit."""
    if not experts:
        return 0
    return experts * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts


def _small(parameters: dict[str, nn.Parameter]) -> int:
    """What is no matrix."""
    return sum(p.numel() for p in parameters.values() if p.dim() < 2)


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def _bridge(model: DLCMForCausalLM, config: DLCMConfig) -> float:
    """What the paper leaves out of its matching: boundaries and reading by each token, W_up and keys once a concept."""
    stage = model.model.concepts
    if stage is None:
        return 0
    of_tokens = _matrices(stage.boundary) + _matrices(stage.read.q_proj) + _matrices(stage.read.o_proj)
    of_concepts = _matrices(stage.up) + _matrices(stage.read.k_proj) + _matrices(stage.read.v_proj)
    return of_tokens + of_concepts / config.compression_ratio


def _attention(config: DLCMConfig, sequence_length: int) -> float:
    dims = 2 * config.head_dim
    if config.kv_lora_rank is not None:
        dims = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    keys = sequence_length / 2
    total = config.num_hidden_layers * config.num_attention_heads * keys * dims
    if config.num_concept_layers:
        ratio = config.compression_ratio
        total += config.num_concept_layers * config.num_concept_heads * keys / ratio * dims / ratio
        total += config.num_attention_heads * keys / ratio * 2 * config.head_dim
    return total
