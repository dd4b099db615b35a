"""The block of an EngramModel: a memory in some, MLA, and DeepSeekMoE or a dense SwiGLU (byrote.models.block).

Blocks behind the last one, from layer id num_hidden_layers on, belong to the modules of multi-token prediction
(byrote.nn.mtp): without a memory, and with experts if the last block of the trunk has them.
"""

from __future__ import annotations

from byrote.models.block import Block
from byrote.models.engram.configuration import EngramConfig
from byrote.nn.engram import Engram, UngatedMemory
from byrote.nn.mla import MLA
from byrote.nn.moe import MLP, DeepSeekMoE
from byrote.nn.rope import yarn_softmax_scale


class EngramBlock(Block):
    """Block `layer_id` of a config: a memory if the config names the block, MLA, experts (see above)."""

    def __init__(self, config: EngramConfig, layer_id: int) -> None:
        single = layer_id in config.memory_layers and config.memory_fusion == "single"
        super().__init__(
            config,
            config.hidden_size,
            2 * layer_id,
            attention=_attention(config),
            experts=_experts(config, layer_id),
            memory=_memory(config, single) if layer_id in config.memory_layers else None,
            single_fusion=single,
        )
        self.layer_id = layer_id


def _memory(config: EngramConfig, single: bool) -> Engram | UngatedMemory:
    if not config.memory_gate:
        return UngatedMemory(config.hidden_size, config.memory_size)
    return Engram(
        config.hidden_size,
        config.memory_size,
        num_streams=1 if single else config.num_streams,
        kernel_size=config.memory_kernel_size,
        dilation=len(config.memory_table_sizes) + 1,
        bias=config.memory_bias,
        zero_gate_rule=config.memory_zero_gate_rule,  # type: ignore[arg-type]
    )


def _attention(config: EngramConfig) -> MLA:
    return MLA(
        config.hidden_size,
        config.num_attention_heads,
        config.q_lora_rank,
        config.kv_lora_rank,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
        eps=config.rms_norm_eps,
        softmax_scale=yarn_softmax_scale(config.qk_nope_head_dim + config.qk_rope_head_dim, config.yarn_parameters),
    )


def _experts(config: EngramConfig, layer_id: int) -> MLP | DeepSeekMoE:
    if min(layer_id, config.num_hidden_layers - 1) < config.first_k_dense_replace:
        return MLP(config.hidden_size, config.intermediate_size)
    return DeepSeekMoE(
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.shared_expert_intermediate_size,
        scores=config.scoring_func,  # type: ignore[arg-type]
        renormalize=config.norm_topk_prob,
        route_scale=config.routed_scaling_factor,
        n_group=config.n_group,
        topk_group=config.topk_group,
    )
