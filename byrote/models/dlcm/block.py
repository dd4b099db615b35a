"""The blocks of a DLCM: of tokens, in encoder and decoder, and of concepts; the same sublayers at two widths."""

from __future__ import annotations

from byrote.models.block import Block
from byrote.models.dlcm.configuration import DLCMConfig
from byrote.nn.engram import Engram
from byrote.nn.gqa import GroupedQueryAttention
from byrote.nn.mla import MLA
from byrote.nn.moe import MLP, DeepSeekMoE


class TokenBlock(Block):
    """Layer `layer_id` of encoder and decoder together; the encoder's may have a memory."""

    def __init__(self, config: DLCMConfig, layer_id: int) -> None:
        memory = None
        if layer_id in config.memory_layers:
            memory = Engram(
                config.hidden_size,
                config.memory_size,
                num_streams=config.num_streams,
                kernel_size=config.memory_kernel_size,
                dilation=len(config.memory_table_sizes) + 1,
                bias=config.memory_bias,
                zero_gate_rule=config.memory_zero_gate_rule,  # type: ignore[arg-type]
            )
        super().__init__(
            config,
            config.hidden_size,
            2 * layer_id,
            attention=_attention(
                config, config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.kv_lora_rank
            ),
            experts=MLP(config.hidden_size, config.intermediate_size),
            memory=memory,
        )


class ConceptBlock(Block):
    """A block of the concept transformer: attention of its own widths, then experts or a dense layer, without a
    memory.
    """

    def __init__(self, config: DLCMConfig, layer_id: int) -> None:
        size, rank = config.concept_size, config.kv_lora_rank
        super().__init__(
            config,
            size,
            2 * layer_id,
            attention=_attention(
                config,
                size,
                config.num_concept_heads,
                config.num_concept_key_value_heads,
                None if rank is None else rank * size // config.hidden_size,
            ),
            experts=_experts(config),
        )


def _attention(
    config: DLCMConfig, hidden_size: int, heads: int, key_value_heads: int, rank: int | None
) -> GroupedQueryAttention | MLA:
    if rank is None:
        return GroupedQueryAttention(hidden_size, heads, key_value_heads, config.head_dim)
    return MLA(
        hidden_size,
        heads,
        None,
        rank,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
        eps=config.rms_norm_eps,
    )


def _experts(config: DLCMConfig) -> MLP | DeepSeekMoE:
    if not config.n_routed_experts:
        return MLP(config.concept_size, config.concept_intermediate_size)
    return DeepSeekMoE(
        config.concept_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.shared_expert_intermediate_size,
    )
