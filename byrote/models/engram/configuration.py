"""EngramConfig: a DeepSeek-V3-style backbone and its memories, with presets.

Names are those of transformers' DeepseekV3Config where the thing is the same. The fields of memories and
streams are those of byrote.models.configuration, and further:

    memory_fusion        "streams": added to every stream, one key each; "single": a sublayer between connections,
                         read from and written to the streams as attention is (the paper's "w/o multi branch")
    num_nextn_predict_layers  modules for multi-token prediction; see byrote.nn.mtp
    mtp_loss_weight      lambda: of their loss in training
"""

import math
from typing import Any

from byrote.models.configuration import MemoryConfig
from byrote.models.engram.presets import PRESETS
from byrote.nn.rope import Yarn


class EngramConfig(MemoryConfig):
    """Fields of an Engram model; ValueError where one is out of range or two disagree. `from_preset` gives named
    shapes.
    """

    model_type = "byrote_engram"
    presets = PRESETS

    num_hidden_layers: int = 4
    q_lora_rank: int | None = None
    kv_lora_rank: int = 16
    yarn: dict[str, float] | None = None
    first_k_dense_replace: int = 1
    n_routed_experts: int = 8
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    num_nextn_predict_layers: int = 0
    mtp_loss_weight: float = 0.3
    memory_gate: bool = True
    memory_fusion: str = "streams"  # type: ignore[misc]
    tie_word_embeddings: bool = True

    @property
    def num_key_value_heads(self) -> int:
        """Latent attention has as many as heads."""
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """The dimensions that turn, which is what transformers asks for."""
        return self.qk_rope_head_dim

    @property
    def yarn_parameters(self) -> Yarn | None:
        return Yarn(**self.yarn) if self.yarn else None  # type: ignore[arg-type]

    def _implied(self) -> dict[str, Any]:
        turning = {"head_dim": self.head_dim, "qk_head_dim": self.qk_nope_head_dim + self.qk_rope_head_dim}
        return {**super()._implied(), **turning, "num_key_value_heads": self.num_key_value_heads}

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
        if not 0 <= self.mtp_loss_weight < math.inf:
            refuse("mtp_loss_weight", "0 or more; DeepSeek-V3 has 0.3, then 0.1")
        self._check_memory(self.num_hidden_layers)
        if self.memory_fusion not in ("streams", "single"):
            refuse("memory_fusion", "must be 'streams' or 'single'")
        if not self.memory_gate and self.memory_kernel_size:
            refuse("memory_kernel_size", "0 without a gate (the convolution acts on gated values)")
