"""EngramConfig without memories <-> DeepseekV3Config.

What would change a logit and cannot be said on the other side is refused; what changes none is left out (dropout,
auxiliary losses, caches). Facts behind the refusals, from DeepSeek's released code:

- The norms of the latents have eps 1e-6, whatever `rms_norm_eps` says; ours have `rms_norm_eps`.
- The temperature of YaRN stands on the softmax scale alone, which is so when mscale and mscale_all_dim are equal.
- A group of experts is ranked by its two best, so it has at least two.
- The shared expert is n_shared_experts times as wide as a routed one; ours has a width of its own.
"""

from __future__ import annotations

from typing import Any

from transformers import DeepseekV3Config

from byrote.models.engram import EngramConfig

LATENT_EPS = 1e-6
# Fields with one name and one meaning on both sides.
SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_nextn_predict_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
    "intermediate_size",
    "first_k_dense_replace",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "dtype",
)
# The only value with which a DeepseekV3 checkpoint is what byrote computes; absent counts as that value.
FIXED: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "rope_interleave": True,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


def to_deepseek_v3_config(config: EngramConfig, *, backbone_only: bool = False) -> DeepseekV3Config:
    """The same backbone in DeepSeek's words. `backbone_only` leaves memories out, which are refused otherwise."""
    if config.memory_layers and not backbone_only:
        raise ValueError(
            f"memory_layers={config.memory_layers}: DeepSeek-V3 has none; backbone_only=True leaves them out"
        )
    if config.num_streams != 1:
        raise ValueError(f"num_streams={config.num_streams}: DeepSeek-V3 has one residual stream; train one with 1")
    if config.scoring_func != "sigmoid":
        raise ValueError(f"scoring_func={config.scoring_func!r}: the router of DeepSeek-V3 knows 'sigmoid' only")
    shared, rest = divmod(config.shared_expert_intermediate_size, config.moe_intermediate_size)
    if rest:
        raise ValueError(
            f"shared_expert_intermediate_size={config.shared_expert_intermediate_size} is no multiple of "
            f"moe_intermediate_size={config.moe_intermediate_size}, and DeepSeek-V3 counts shared experts: "
            "train a model with a multiple of it"
        )
    if config.num_nextn_predict_layers and config.first_k_dense_replace == config.num_hidden_layers:
        raise ValueError(
            f"num_nextn_predict_layers={config.num_nextn_predict_layers} with first_k_dense_replace="
            f"{config.first_k_dense_replace}, all blocks: the prediction modules of DeepSeek-V3 have experts, these "
            "have none; train a model with experts in its last block, or without modules"
        )
    _check_common(config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if yarn := config.yarn_parameters:
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale,
            "attention_factor": 1.0,  # of cos and sin; follows from equal mscales, unless they are 0
        }
    fields: dict[str, Any] = {field: getattr(config, field) for field in SHARED} | FIXED
    fields |= {"num_key_value_heads": config.num_attention_heads, "n_shared_experts": shared}
    fields |= {"rope_parameters": rope}
    return DeepseekV3Config(**fields)


def from_deepseek_v3_config(config: DeepseekV3Config) -> EngramConfig:
    """The same model, without memories, in our words."""
    for field, value in FIXED.items():
        found = getattr(config, field, value)
        if found != value:
            raise ValueError(f"{field}={found!r}: byrote computes {value!r} only; this checkpoint cannot be imported")
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads={config.num_key_value_heads}: latent attention has as many as num_attention_heads="
            f"{config.num_attention_heads}; this checkpoint cannot be imported"
        )
    if getattr(config, "quantization_config", None):
        raise ValueError(
            "quantization_config: the weights are quantized; convert them to bfloat16 (DeepSeek's fp8_cast_bf16.py "
            "does) and remove this field"
        )
    _check_common(config)
    fields = {field: getattr(config, field) for field in SHARED} | {"rope_parameters": config.rope_parameters}
    fields |= {"n_group": config.n_group or 1, "topk_group": config.topk_group or 1}
    fields["num_nextn_predict_layers"] = config.num_nextn_predict_layers or 0
    fields["first_k_dense_replace"] = min(config.first_k_dense_replace or 0, config.num_hidden_layers)
    return EngramConfig(
        **fields,
        memory_layers=[],
        shared_expert_intermediate_size=config.n_shared_experts * config.moe_intermediate_size,
    )


def _check_common(config: Any) -> None:
    if config.rms_norm_eps != LATENT_EPS:
        raise ValueError(
            f"rms_norm_eps={config.rms_norm_eps}: DeepSeek-V3 normalizes its latents with {LATENT_EPS} whatever this "
            f"is, byrote with this; the two agree at {LATENT_EPS} only"
        )
    if config.first_k_dense_replace < config.num_hidden_layers and config.n_routed_experts < 2 * (config.n_group or 1):
        raise ValueError(
            f"n_group={config.n_group} of n_routed_experts={config.n_routed_experts}: DeepSeek-V3 ranks a group by its "
            "two best experts; a group needs at least two"
        )
