"""DLCMConfig: a token encoder, a deep transformer over concepts, a token decoder (2512.24617, section 3), with presets.

    hidden_size, num_attention_heads, num_key_value_heads, head_dim, intermediate_size    of encoder and decoder
    concept_size, num_concept_heads, num_concept_key_value_heads, concept_intermediate_size   of the concept transformer
    num_encoder_layers, num_concept_layers, num_decoder_layers; without concept layers it is a plain Llama, the baseline

    compression_ratio    R: tokens per concept that training aims at;  boundary_weight: lambda of the loss that does
    boundary_convention  "close", "open", or "literal", which shows tokens their future: a control (byrote.nn.concept)
    boundary_mode        "decoupled": the language loss does not move boundaries; "e2e": it does, by smoothing and by a
                         straight-through factor, as in H-Net; "rule": no parameters and no loss, by a threshold
    boundary_threshold   the p from which on a boundary is, when not sampled;  boundary_temperature: tau of the sampling
    boundary_size        d_scan: width of q and k; hidden_size unless given
    concept_smoothing    "ema" or "none" (byrote.nn.concept)
    concept_weighting    "replicated" or "uniform";  concept_kernel: "sdpa", "dense", "flex" or "varlen"
                         (byrote.nn.concept_attention)
    mup_base_width       d_base of decoupled muP (section 6.1); None: standard parametrization

The fields of memories, in layers of the encoder, and of streams are those of byrote.models.configuration. Offered, and
tested, are three forms: the paper's (GQA, dense, plain residual); the same with memories; and DeepSeek's: latent
attention (kv_lora_rank), experts in the concept transformer (n_routed_experts), several streams, and memories.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from byrote.models.configuration import MemoryConfig
from byrote.models.dlcm.checks import check
from byrote.models.dlcm.presets import PRESETS


class DLCMConfig(MemoryConfig, PreTrainedConfig):
    model_type = "byrote_dlcm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    presets = PRESETS

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 64,
        num_encoder_layers: int = 1,
        num_concept_layers: int = 2,
        num_decoder_layers: int = 1,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        head_dim: int = 16,
        intermediate_size: int = 192,
        concept_size: int = 128,
        num_concept_heads: int = 8,
        num_concept_key_value_heads: int = 4,
        concept_intermediate_size: int = 384,
        compression_ratio: float = 4.0,
        boundary_convention: str = "close",
        boundary_mode: str = "decoupled",
        boundary_weight: float = 0.03,
        boundary_temperature: float = 6.0,
        boundary_threshold: float = 0.5,
        boundary_size: int | None = None,
        concept_smoothing: str = "ema",
        concept_weighting: str = "replicated",
        concept_kernel: str = "sdpa",
        mup_base_width: int | None = None,
        rope_theta: float = 10000.0,
        max_position_embeddings: int = 4096,
        kv_lora_rank: int | None = None,
        qk_nope_head_dim: int = 16,
        qk_rope_head_dim: int = 8,
        v_head_dim: int = 16,
        n_routed_experts: int = 0,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int = 64,
        shared_expert_intermediate_size: int = 64,
        router_bias_update_rate: float = 0.001,
        balance_loss_alpha: float = 1e-4,
        num_streams: int = 1,
        stream_connection: str = "mhc",
        memory_layers: list[int] | None = None,
        memory_contract: str = "engram",
        memory_table_sizes: list[int] | None = None,
        memory_heads: int = 2,
        memory_row_width: int = 8,
        memory_pad_token_id: int = 2,
        memory_seed: int = 0,
        memory_codec: str = "fp32",
        memory_kernel_size: int = 4,
        memory_zero_gate_rule: str = "sign",
        memory_bias: bool = False,
        memory_initializer_range: float = 0.02,
        address: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = 0,
        eos_token_id: int | None = 1,
        pad_token_id: int | None = 2,
        use_cache: bool = True,
        vocabulary: np.ndarray | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_encoder_layers = num_encoder_layers
        self.num_concept_layers = num_concept_layers
        self.num_decoder_layers = num_decoder_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.concept_size = concept_size
        self.num_concept_heads = num_concept_heads
        self.num_concept_key_value_heads = num_concept_key_value_heads
        self.concept_intermediate_size = concept_intermediate_size
        self.compression_ratio = compression_ratio
        self.boundary_convention = boundary_convention
        self.boundary_mode = boundary_mode
        self.boundary_weight = boundary_weight
        self.boundary_temperature = boundary_temperature
        self.boundary_threshold = boundary_threshold
        self.boundary_size = boundary_size
        self.concept_smoothing = concept_smoothing
        self.concept_weighting = concept_weighting
        self.concept_kernel = concept_kernel
        self.mup_base_width = mup_base_width
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.router_bias_update_rate = router_bias_update_rate
        self.balance_loss_alpha = balance_loss_alpha
        self.num_streams = num_streams
        self.stream_connection = stream_connection
        self._set_memory(locals())
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache and boundary_convention != "literal"
        kwargs.pop("num_hidden_layers", None)  # of a saved config; it follows from the two
        super().__init__(  # type: ignore[call-arg]
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        check(self)
        self.address = address
        if self.memory_layers:
            self._settle_address(vocabulary)

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
