"""Parameters and FLOPs of a config, counted from the built modules on the meta device.

active: parameters that one token uses: everything but the tables (its rows are counted instead) and, of the routed
experts, the `num_experts_per_tok` that it visits. The embedding counts as the one row that is read, unless it is tied
to the head, which multiplies by all of it. Modules of multi-token prediction are in neither number, but in
`prediction`: without them it is the same model.

flops_per_token: forward and backward, 6 per weight of a matrix product that the token takes part in (2 forward, 4
backward), plus attention over an average causal context of half of `sequence_length`. Reading a row costs none. The
modules are trained with the rest and counted here, each with its own pass through the head.
"""

from __future__ import annotations

import torch
from torch import nn

from byrote.models.counts import Counts
from byrote.models.engram.configuration import EngramConfig
from byrote.models.engram.modeling import EngramForCausalLM


def count(config: EngramConfig, sequence_length: int = 256) -> Counts:
    """Count what `config` describes; nothing is allocated."""
    with torch.device("meta"):
        model = EngramForCausalLM(config)
    spec = config.spec
    table = sum(layer.rows for layer in spec.layers) * config.memory_row_width if spec else 0
    read = len(config.memory_layers) * config.memory_size
    anchors = len(config.memory_layers)
    modules = dict(model.model.mtp.named_parameters())
    trunk = {name: p for name, p in model.named_parameters() if not name.startswith("model.mtp.")}
    backbone = sum(p.numel() for p in trunk.values()) - anchors
    experts = _experts(trunk)
    unread = 0 if config.tie_word_embeddings else (config.vocab_size - 1) * config.hidden_size
    active = backbone - _idle(config, experts) - unread
    matrices = active - _small(trunk) + anchors
    prediction = sum(p.numel() for p in modules.values())
    matrices += prediction - _idle(config, _experts(modules)) - _small(modules)
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


def _experts(parameters: dict[str, nn.Parameter]) -> int:
    return sum(p.numel() for name, p in parameters.items() if ".experts.experts." in name)


def _idle(config: EngramConfig, experts: int) -> int:
    """Of the routed experts' parameters, those that a token does not visit."""
    return experts * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts


def _small(parameters: dict[str, nn.Parameter]) -> int:
    """What is no matrix."""
    return sum(p.numel() for p in parameters.values() if p.dim() < 2)
