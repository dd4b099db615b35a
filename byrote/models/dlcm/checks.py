"""What a DLCMConfig refuses: fields that cannot be, and forms that are none of the three offered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from byrote.nn.concept import CONVENTIONS
from byrote.nn.concept_attention import KERNELS, WEIGHTINGS

if TYPE_CHECKING:
    from byrote.models.dlcm.configuration import DLCMConfig


def check(config: DLCMConfig) -> None:
    refuse = config._refuse
    config._check_streams()
    for field in (
        "hidden_size",
        "num_encoder_layers",
        "num_attention_heads",
        "intermediate_size",
        "concept_size",
        "num_concept_heads",
        "concept_intermediate_size",
    ):
        if getattr(config, field) < 1:
            refuse(field, "at least 1")
    for field in ("num_concept_layers", "num_decoder_layers", "n_routed_experts"):
        if getattr(config, field) < 0:
            refuse(field, "0 or more")
    if not config.num_concept_layers and config.num_decoder_layers:
        refuse("num_decoder_layers", "0 without concept layers: a plain model has all of its layers in the encoder")
    for heads, groups in (
        ("num_attention_heads", "num_key_value_heads"),
        ("num_concept_heads", "num_concept_key_value_heads"),
    ):
        if getattr(config, groups) < 1 or getattr(config, heads) % getattr(config, groups):
            refuse(groups, f"must divide {heads}={getattr(config, heads)}")
    if config.head_dim < 2 or config.head_dim % 2 or config.qk_rope_head_dim % 2:
        refuse("head_dim", "head_dim and qk_rope_head_dim must be even: rotary pairs")
    if not config.compression_ratio > 1:
        refuse("compression_ratio", "tokens per concept, above 1; 4 is the paper's")
    if config.boundary_mode not in ("decoupled", "e2e", "rule"):
        refuse("boundary_mode", "must be 'decoupled', 'e2e' or 'rule'")
    if config.boundary_convention not in CONVENTIONS:
        refuse("boundary_convention", f"must be one of {CONVENTIONS}")
    if config.boundary_weight < 0:
        refuse("boundary_weight", "0 or more; ConceptMoE and H-Net have 0.03")
    if config.boundary_temperature < 1:
        refuse("boundary_temperature", "at least 1, which samples p itconfig; ConceptMoE has 6")
    if not 0 < config.boundary_threshold < 1:
        refuse("boundary_threshold", "between 0 and 1; 0.5 is the paper's")
    if config.boundary_size is not None and config.boundary_size < 1:
        refuse("boundary_size", "at least 1, or None for hidden_size")
    if config.concept_smoothing not in ("ema", "none"):
        refuse("concept_smoothing", "must be 'ema' or 'none'")
    if config.concept_weighting not in WEIGHTINGS:
        refuse("concept_weighting", f"must be one of {WEIGHTINGS}")
    if config.concept_kernel not in KERNELS:
        refuse("concept_kernel", f"must be one of {KERNELS}")
    if config.concept_kernel == "varlen" and config.concept_weighting != "replicated":
        refuse("concept_kernel", "is of concept_weighting='replicated'; 'sdpa' and 'flex' have both")
    if config.mup_base_width is not None and config.mup_base_width < 1:
        refuse("mup_base_width", "a width, or None for the standard parametrization")
    if config.n_routed_experts and config.num_experts_per_tok > config.n_routed_experts:
        refuse("num_experts_per_tok", f"at most n_routed_experts={config.n_routed_experts}")
    _check_form(config)
    config._check_memory(config.num_encoder_layers)


def _check_form(config: DLCMConfig) -> None:
    """Of the three forms that are offered, one."""
    parts = {
        "kv_lora_rank": config.kv_lora_rank is not None,
        "n_routed_experts": config.n_routed_experts > 0,
        "num_streams": config.num_streams > 1,
    }
    if any(parts.values()) and not (all(parts.values()) and config.memory_layers and config.num_concept_layers):
        given = [field for field, there in parts.items() if there]
        raise ValueError(
            f"{', '.join(given)} without the rest: DeepSeek's form has all of kv_lora_rank, n_routed_experts, "
            "num_streams above 1, memory_layers and concept layers; the paper's has none of the first three"
        )
