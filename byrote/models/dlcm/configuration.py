"""DLCMConfig: a token encoder, a deep transformer over concepts, a token decoder (2512.24617, section 3), with presets.

    hidden_size, num_attention_heads, num_key_value_heads, head_dim, intermediate_size    of encoder and decoder
    concept_size, num_concept_heads, num_concept_key_value_heads, concept_intermediate_size   of the concept transformer
    num_encoder_layers, num_concept_layers, num_decoder_layers; without concept layers it is a plain Llama, the baseline

    compression_ratio    R: tokens per concept that training aims at;  boundary_weight: lambda of the loss that does
    boundary_convention  "close", "open", or "literal", which shows tokens their future: a control (byrote.nn.pooling)
    boundary_mode        "decoupled": the language loss does not move boundaries; "e2e": it does, by smoothing and by a
                         straight-through factor, as in H-Net; "rule": no parameters and no loss, by a threshold
    boundary_threshold   the p from which on a boundary is, when not sampled;  boundary_temperature: tau of the sampling
    boundary_size        d_scan: width of q and k; hidden_size unless given
    concept_smoothing    "ema" or "none" (byrote.nn.pooling)
    concept_weighting    "replicated" or "uniform";  concept_kernel: "sdpa", "dense", "flex" or "varlen"
                         (byrote.nn.concept_attention)
    mup_base_width       d_base of decoupled muP (section 6.1); None: standard parametrization

The fields of memories, in layers of the encoder, and of streams are those of byrote.models.configuration. Offered, and
tested, are three forms: the paper's (GQA, dense, plain residual); the same with memories; and DeepSeek's: latent
attention (kv_lora_rank), experts in the concept transformer (n_routed_experts), several streams, and memories.
"""

import math
from typing import Any

from byrote.models.configuration import MemoryConfig
from byrote.models.dlcm.presets import PRESETS
from byrote.nn.concept_attention import KERNELS, WEIGHTINGS
from byrote.nn.pooling import CONVENTIONS


class DLCMConfig(MemoryConfig):
    """Fields of a DLCM; ValueError where one is out of range or two disagree. See above, and `MemoryConfig` for
    memories.
    """

    model_type = "byrote_dlcm"
    presets = PRESETS

    num_encoder_layers: int = 1
    num_concept_layers: int = 2
    num_decoder_layers: int = 1
    num_key_value_heads: int = 2
    head_dim: int = 16
    concept_size: int = 128
    num_concept_heads: int = 8
    num_concept_key_value_heads: int = 4
    concept_intermediate_size: int = 384
    compression_ratio: float = 4.0
    boundary_convention: str = "close"
    boundary_mode: str = "decoupled"
    boundary_weight: float = 0.03
    boundary_temperature: float = 6.0
    boundary_threshold: float = 0.5
    boundary_size: int | None = None
    concept_smoothing: str = "ema"
    concept_weighting: str = "replicated"
    concept_kernel: str = "sdpa"
    mup_base_width: int | None = None
    kv_lora_rank: int | None = None
    n_routed_experts: int = 0
    moe_intermediate_size: int = 64
    shared_expert_intermediate_size: int = 64
    tie_word_embeddings: bool = False

    def __post_init__(self, **words: Any) -> None:
        self.use_cache = self.use_cache and self.boundary_convention != "literal"
        super().__post_init__(**words)

    @property
    def num_hidden_layers(self) -> int:
        """Those whose keys are one a token: what a cache of attention layers is made for."""
        return self.num_encoder_layers + self.num_decoder_layers

    @property
    def query_size(self) -> int:
        """Width of a boundary's q; by the rule that is the state itself."""
        return (self.boundary_mode != "rule" and self.boundary_size) or self.hidden_size

    @property
    def token_scale(self) -> float:
        """s_token = d_token / d_base of muP; 1 without."""
        return self.hidden_size / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def concept_scale(self) -> float:
        """s_concept = d_concept / d_base of muP; 1 without."""
        return self.concept_size / self.mup_base_width if self.mup_base_width else 1.0

    def _implied(self) -> dict[str, Any]:
        return {**super()._implied(), "num_hidden_layers": self.num_hidden_layers}

    def _check(self) -> None:
        refuse = self._refuse
        self._check_streams()
        for field in (
            "hidden_size",
            "num_encoder_layers",
            "num_attention_heads",
            "intermediate_size",
            "concept_size",
            "num_concept_heads",
            "concept_intermediate_size",
        ):
            if getattr(self, field) < 1:
                refuse(field, "at least 1")
        for field in ("num_concept_layers", "num_decoder_layers", "n_routed_experts"):
            if getattr(self, field) < 0:
                refuse(field, "0 or more")
        if not self.num_concept_layers and self.num_decoder_layers:
            refuse("num_decoder_layers", "0 without concept layers: a plain model has all of its layers in the encoder")
        for heads, groups in (
            ("num_attention_heads", "num_key_value_heads"),
            ("num_concept_heads", "num_concept_key_value_heads"),
        ):
            if getattr(self, groups) < 1 or getattr(self, heads) % getattr(self, groups):
                refuse(groups, f"must divide {heads}={getattr(self, heads)}")
        if self.head_dim < 2 or self.head_dim % 2 or self.qk_rope_head_dim % 2:
            refuse("head_dim", "head_dim and qk_rope_head_dim must be even: rotary pairs")
        if not 1 < self.compression_ratio < math.inf:
            refuse("compression_ratio", "tokens per concept, above 1; 4 is the paper's")
        if self.boundary_mode not in ("decoupled", "e2e", "rule"):
            refuse("boundary_mode", "must be 'decoupled', 'e2e' or 'rule'")
        if self.boundary_convention not in CONVENTIONS:
            refuse("boundary_convention", f"must be one of {CONVENTIONS}")
        if not 0 <= self.boundary_weight < math.inf:
            refuse("boundary_weight", "0 or more; ConceptMoE and H-Net have 0.03")
        if not 1 <= self.boundary_temperature < math.inf:
            refuse("boundary_temperature", "at least 1, which samples p itself; ConceptMoE has 6")
        if not 0 < self.boundary_threshold < 1:
            refuse("boundary_threshold", "between 0 and 1; 0.5 is the paper's")
        if self.boundary_size is not None and self.boundary_size < 1:
            refuse("boundary_size", "at least 1, or None for hidden_size")
        if self.concept_smoothing not in ("ema", "none"):
            refuse("concept_smoothing", "must be 'ema' or 'none'")
        if self.concept_weighting not in WEIGHTINGS:
            refuse("concept_weighting", f"must be one of {WEIGHTINGS}")
        if self.concept_kernel not in KERNELS:
            refuse("concept_kernel", f"must be one of {KERNELS}")
        if self.concept_kernel == "varlen" and self.concept_weighting != "replicated":
            refuse("concept_kernel", "is of concept_weighting='replicated'; 'sdpa' and 'flex' have both")
        if self.mup_base_width is not None and self.mup_base_width < 1:
            refuse("mup_base_width", "a width, or None for the standard parametrization")
        if self.n_routed_experts and self.num_experts_per_tok > self.n_routed_experts:
            refuse("num_experts_per_tok", f"at most n_routed_experts={self.n_routed_experts}")
        self._check_form()
        self._check_memory(self.num_encoder_layers)

    def _check_form(self) -> None:
        """Of the three forms that are offered, one."""
        parts = {
            "kv_lora_rank": self.kv_lora_rank is not None,
            "n_routed_experts": self.n_routed_experts > 0,
            "num_streams": self.num_streams > 1,
        }
        if any(parts.values()) and not (all(parts.values()) and self.memory_layers and self.num_concept_layers):
            given = [field for field, there in parts.items() if there]
            raise ValueError(
                f"{', '.join(given)} without the rest: DeepSeek's form has all of kv_lora_rank, n_routed_experts, "
                "num_streams above 1, memory_layers and concept layers; the paper's has none of the first three"
            )
