"""EngramConfig: a DeepSeek-V3-style backbone and its memories, with presets.

Names are those of transformers' DeepseekV3Config where the thing is the same. Fields of the memory:

    memory_layers        zero-based blocks with a memory; [] is the backbone alone
    memory_contract      "engram" (paper and demo) or "deepseek_v41"
    memory_table_sizes   rows wanted in each head's table, one number per order 2, 3, ...: primes from there on
    memory_heads         hash heads per order;  memory_row_width: values in one row
    memory_pad_token_id  raw id that stands before a document;  memory_seed: of the multipliers
    memory_kernel_size   taps of the short convolution (0: none); its dilation is the highest order
    memory_zero_gate_rule, memory_bias, memory_initializer_range: see byrote.nn.engram and byrote.tables.ram
    memory_codec         how rows are stored, in RAM and in files: "fp32", "bf16", "bf16-stochastic", "fp8", "int8" or
                         "int4"; see byrote.tables.codecs
    memory_fusion        "streams": added to every stream, one key each; "single": a sublayer between connections,
                         read from and written to the streams as attention is (the paper's "w/o multi branch")
    address              the AddressSpec that follows from these and the vocabulary map, as a dict; filled in if absent

    num_streams          residual streams; 1 is the plain residual
    stream_connection    with more: "mhc" (as DeepSeek-V4), "mhc_paper" or "hc"; see byrote.nn.hyper

    num_nextn_predict_layers  modules for multi-token prediction; see byrote.nn.mtp
    mtp_loss_weight      lambda: of their loss in training

Row width times heads times orders is the paper's d_mem (table 5: 1280); the demo's `n_embed_per_ngram` is row width
times heads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from byrote.address import AddressSpec, deepseek_v41, engram
from byrote.models.engram.presets import PRESETS
from byrote.nn.rope import Yarn
from byrote.tables.codecs import CODECS


class EngramConfig(PreTrainedConfig):
    model_type = "byrote_engram"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

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
        self.memory_layers = [] if memory_layers is None else list(memory_layers)
        self.memory_contract = memory_contract
        self.memory_table_sizes = [1024, 1024] if memory_table_sizes is None else list(memory_table_sizes)
        self.memory_heads = memory_heads
        self.memory_row_width = memory_row_width
        self.memory_pad_token_id = memory_pad_token_id
        self.memory_seed = memory_seed
        self.memory_gate = memory_gate
        self.memory_fusion = memory_fusion
        self.memory_codec = memory_codec
        self.memory_kernel_size = memory_kernel_size
        self.memory_zero_gate_rule = memory_zero_gate_rule
        self.memory_bias = memory_bias
        self.memory_initializer_range = memory_initializer_range
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

    @classmethod
    def from_preset(cls, name: str, *, vocabulary: np.ndarray | None = None, **overrides: Any) -> EngramConfig:
        """A named shape with some fields changed.

        `vocabulary`: the map of `byrote.address.compress(tokenizer)`; it sets `vocab_size` and the addresses.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        if vocabulary is not None:
            overrides.setdefault("vocab_size", len(vocabulary))
        return cls(**{**PRESETS[name], **overrides}, vocabulary=vocabulary)

    @property
    def spec(self) -> AddressSpec | None:
        """The addresses of all memories; None without any."""
        return AddressSpec.from_dict(self.address) if self.memory_layers and self.address else None

    @property
    def memory_size(self) -> int:
        """d_mem: values that one token reads in one layer."""
        return len(self.memory_table_sizes) * self.memory_heads * self.memory_row_width

    @property
    def yarn_parameters(self) -> Yarn | None:
        return Yarn(**self.yarn) if self.yarn else None  # type: ignore[arg-type]

    def _settle_address(self, vocabulary: np.ndarray | None) -> None:
        if self.address is None or vocabulary is not None:
            vocabulary = np.arange(self.vocab_size) if vocabulary is None else vocabulary
            if len(vocabulary) != self.vocab_size:
                raise ValueError(
                    f"vocabulary maps {len(vocabulary)} ids, vocab_size is {self.vocab_size}: they must be equal"
                )
            self.address = self._make_spec(vocabulary).to_dict()
        spec = self.spec
        assert spec is not None
        claims = {
            "memory_contract": (self.memory_contract, spec.contract),
            "memory_layers": (self.memory_layers, [layer.layer_id for layer in spec.layers]),
            "memory_heads": (self.memory_heads, spec.heads),
            "memory_table_sizes": (len(self.memory_table_sizes) + 1, spec.max_order),
            "memory_seed": (self.memory_seed, spec.seed),
            "vocab_size": (self.vocab_size, spec.vocab_size),
        }
        for field, (configured, addressed) in claims.items():
            if configured != addressed:
                raise ValueError(
                    f"{field} says {configured}, the address spec {addressed}: drop `address` to derive it anew, "
                    "or give back the fields that it was made with"
                )
        # The sizes do not depend on the vocabulary, so any will do.
        expected = [layer.primes for layer in self._make_spec(np.arange(self.vocab_size)).layers]
        if expected != [layer.primes for layer in spec.layers]:
            raise ValueError(
                f"memory_table_sizes={self.memory_table_sizes} would give layers of "
                f"{[sum(map(sum, primes)) for primes in expected]} rows, the address spec has "
                f"{[layer.rows for layer in spec.layers]}: drop `address` to derive it anew, or give back the sizes"
            )

    def _make_spec(self, vocabulary: np.ndarray) -> AddressSpec:
        common: dict[str, Any] = {
            "heads": self.memory_heads,
            "layer_ids": self.memory_layers,
            "pad_id": self.memory_pad_token_id,
            "max_order": len(self.memory_table_sizes) + 1,
        }
        if self.memory_contract == "engram":
            return engram(vocabulary, table_sizes=self.memory_table_sizes, seed=self.memory_seed, **common)
        return deepseek_v41(vocabulary, table_size=self.memory_table_sizes[0], **common)

    def _check(self) -> None:
        def refuse(field: str, remedy: str) -> None:
            raise ValueError(f"{field}={getattr(self, field)!r}: {remedy}")

        if self.num_streams < 1:
            refuse("num_streams", "at least 1, which is the plain residual; the paper has 4")
        if self.stream_connection not in ("mhc", "mhc_paper", "hc"):
            refuse("stream_connection", "must be 'mhc', 'mhc_paper' or 'hc'")
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
        if sorted(set(self.memory_layers)) != self.memory_layers or any(
            not 0 <= layer < self.num_hidden_layers for layer in self.memory_layers
        ):
            refuse("memory_layers", f"ascending block numbers in 0..{self.num_hidden_layers - 1}, each once")
        if self.memory_contract not in ("engram", "deepseek_v41"):
            refuse("memory_contract", "must be 'engram' or 'deepseek_v41'")
        if self.memory_contract == "deepseek_v41" and (len(set(self.memory_table_sizes)) > 1 or self.memory_seed):
            refuse("memory_contract", "DeepSeek-V4.1 has one table size for all orders and seed 0")
        if not self.memory_table_sizes or min(self.memory_table_sizes) < 1:
            refuse("memory_table_sizes", "one positive number of rows per order, for orders 2, 3, ...")
        for field in ("memory_heads", "memory_row_width"):
            if getattr(self, field) < 1:
                refuse(field, "must be at least 1")
        if self.memory_fusion not in ("streams", "single"):
            refuse("memory_fusion", "must be 'streams' or 'single'")
        if self.memory_codec not in CODECS:
            refuse("memory_codec", f"must be one of {sorted(CODECS)}")
        if self.memory_zero_gate_rule not in ("sign", "copysign"):
            refuse("memory_zero_gate_rule", "must be 'sign' or 'copysign'")
        if not 0 <= self.memory_pad_token_id < self.vocab_size:
            refuse("memory_pad_token_id", f"a token id below vocab_size={self.vocab_size}")
        if self.memory_kernel_size < 0 or (not self.memory_gate and self.memory_kernel_size):
            refuse("memory_kernel_size", "0 or more, and 0 without a gate (the convolution acts on gated values)")
