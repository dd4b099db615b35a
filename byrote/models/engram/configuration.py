"""EngramConfig: a DeepSeek-V3-style backbone and its memories, with presets.

Names are those of transformers' DeepseekV3Config where the thing is the same. The fields of memories and
streams are those of byrote.models.configuration, and further:

    memory_fusion        "streams": added to every stream, one key each; "single": a sublayer between connections,
                         read from and written to the streams as attention is (the paper's "w/o multi branch")
    num_nextn_predict_layers  modules for multi-token prediction; see byrote.nn.mtp
    mtp_loss_weight      lambda: of their loss in training
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from byrote.models.configuration import MemoryConfig
from byrote.models.engram.presets import PRESETS
from byrote.nn.rope import Yarn


class EngramConfig(MemoryConfig, PreTrainedConfig):
    model_type = "byrote_engram"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    presets = PRESETS

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 64,
        num_hidden_layers: int = 4,
        num_streams: int = 1,
        stream_connection: str = "mhc",
        num_attention_heads: int = 4,
        q_lora_rank: int | None = None,
        kv_lora_rank: int = 16,
        qk_nope_head_dim: int = 16,
        qk_rope_head_dim: int = 8,
        v_head_dim: int = 16,
        rope_theta: float = 10000.0,
        yarn: dict[str, float] | None = None,
        max_position_embeddings: int = 4096,
        intermediate_size: int = 192,
        first_k_dense_replace: int = 1,
        n_routed_experts: int = 8,
        num_experts_per_tok: int = 2,
        moe_intermediate_size: int = 32,
        shared_expert_intermediate_size: int = 32,
        scoring_func: str = "sigmoid",
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
        router_bias_update_rate: float = 0.001,
        balance_loss_alpha: float = 1e-4,
        num_nextn_predict_layers: int = 0,
        mtp_loss_weight: float = 0.3,
        memory_layers: list[int] | None = None,
        memory_contract: str = "engram",
        memory_table_sizes: list[int] | None = None,
        memory_heads: int = 2,
        memory_row_width: int = 8,
        memory_pad_token_id: int = 2,
        memory_seed: int = 0,
        memory_gate: bool = True,
        memory_fusion: str = "streams",
        memory_codec: str = "fp32",
        memory_kernel_size: int = 4,
        memory_zero_gate_rule: str = "sign",
        memory_bias: bool = False,
        memory_initializer_range: float = 0.02,
        address: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = 0,
        eos_token_id: int | None = 1,
        pad_token_id: int | None = 2,
        use_cache: bool = True,
        vocabulary: np.ndarray | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_streams = num_streams
        self.stream_connection = stream_connection
        self.num_attention_heads = num_attention_heads
        self.q_lora_rank = q_lora_rank
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.rope_theta = rope_theta
        self.yarn = yarn
        self.max_position_embeddings = max_position_embeddings
        self.intermediate_size = intermediate_size
        self.first_k_dense_replace = first_k_dense_replace
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.scoring_func = scoring_func
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.n_group = n_group
        self.topk_group = topk_group
        self.router_bias_update_rate = router_bias_update_rate
        self.balance_loss_alpha = balance_loss_alpha
        self.num_nextn_predict_layers = num_nextn_predict_layers
        self.mtp_loss_weight = mtp_loss_weight
        self._set_memory(locals())
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.num_key_value_heads = num_attention_heads
        self.head_dim = qk_rope_head_dim
        super().__init__(  # type: ignore[call-arg]
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self._check()
        self.address = address
        if self.memory_layers:
            self._settle_address(vocabulary)

    @property
    def yarn_parameters(self) -> Yarn | None:
        return Yarn(**self.yarn) if self.yarn else None  # type: ignore[arg-type]

    def _check(self) -> None:
        refuse = self._refuse
        self._check_streams()
        if self.num_experts_per_tok > self.n_routed_experts:
            refuse("num_experts_per_tok", f"at most n_routed_experts={self.n_routed_experts}")
        if self.scoring_func not in ("sigmoid", "softmax"):
            refuse("scoring_func", "must be 'sigmoid' or 'softmax'")
        if self.n_group < 1 or self.n_routed_experts % self.n_group:
            refuse("n_group", f"must divide n_routed_experts={self.n_routed_experts}")
        if not 1 <= self.topk_group <= self.n_group:
            refuse("topk_group", f"must lie in 1..n_group={self.n_group}")
        if self.yarn is not None:
            try:
                Yarn(**self.yarn)  # type: ignore[arg-type]
            except (TypeError, ValueError) as error:
                refuse("yarn", f"{error}; its fields are {sorted(Yarn.__dataclass_fields__)}")
        if self.qk_rope_head_dim % 2:
            refuse("qk_rope_head_dim", "must be even: rotary pairs")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            refuse("first_k_dense_replace", f"must lie in 0..num_hidden_layers={self.num_hidden_layers}")
        if self.num_nextn_predict_layers < 0:
            refuse("num_nextn_predict_layers", "0 for none, or how many tokens beyond the next one to predict")
        if self.mtp_loss_weight < 0:
            refuse("mtp_loss_weight", "0 or more; DeepSeek-V3 has 0.3, then 0.1")
        self._check_memory(self.num_hidden_layers)
