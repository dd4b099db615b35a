"""Parameters and FLOPs of a DLCM, or of the plain model beside it, counted from the built modules on the meta device.

active: all parameters but those of experts that a token's concept does not visit; the embedding counts as one row.

flops_per_token: forward and backward, 6 per weight of a matrix product (2 forward, 4 backward). What is done once a
concept counts 1 / R. Attention over an average context, half of `sequence_length`: T / 2 keys of tokens, T / 2R of
concepts. Smoothing, pooling and norms are left out, as are rows of tables.

block_macs: the multiply-accumulates that the paper matches in its table 3, those of the blocks' matrices alone.
"""

from __future__ import annotations

import torch
from torch import nn

from byrote.models.counts import Counts
from byrote.models.dlcm.configuration import DLCMConfig
from byrote.models.dlcm.modeling import DLCMForCausalLM


def count(config: DLCMConfig, sequence_length: int = 256) -> Counts:
    model = _on_meta(config)
    spec = config.spec
    table = sum(layer.rows for layer in spec.layers) * config.memory_row_width if spec else 0
    memories = len(config.memory_layers)
    dense = sum(p.numel() for p in model.parameters()) - memories  # without the anchors
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts.experts." in name)
    idle = _idle(config, experts)
    unread = 0 if config.tie_word_embeddings else (config.vocab_size - 1) * config.hidden_size
    matrices = block_macs(config) + config.vocab_size * config.hidden_size + _bridge(model, config)
    return Counts(
        total=dense + table,
        active=dense - idle - unread + memories * config.memory_size,
        table=table,
        experts=experts,
        prediction=0,
        flops_per_token=round(6 * (matrices + _attention(config, sequence_length))),
    )


def block_macs(config: DLCMConfig) -> float:
    """Multiply-accumulates per token in the matrices of all blocks; those of concepts once in R tokens."""
    model = _on_meta(config).model
    tokens = _matrices(model.encoder) + _matrices(model.decoder)
    if model.concepts is None:
        return tokens
    experts = sum(p.numel() for name, p in model.concepts.named_parameters() if ".experts.experts." in name)
    return tokens + (_matrices(model.concepts.layers) - _idle(config, experts)) / config.compression_ratio


def _on_meta(config: DLCMConfig) -> DLCMForCausalLM:
    with torch.device("meta"):
        return DLCMForCausalLM(config)


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


def _idle(config: DLCMConfig, experts: int) -> int:
    if not config.n_routed_experts:
        return 0
    return experts * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts


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
