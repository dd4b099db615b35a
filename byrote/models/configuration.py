"""MemoryConfig: what the configs of all models with memories and residual streams share.

    memory_layers        zero-based blocks with a memory; [] is the model without any
    memory_contract      "engram" (paper and demo) or "deepseek_v41"
    memory_table_sizes   rows wanted in each head's table, one number per order 2, 3, ...: primes from there on
    memory_heads         hash heads per order;  memory_row_width: values in one row
    memory_pad_token_id  raw id that stands before a document;  memory_seed: of the multipliers
    memory_kernel_size   taps of the short convolution (0: none); its dilation is the highest order
    memory_zero_gate_rule, memory_bias, memory_initializer_range: see byrote.nn.engram and byrote.tables.ram
    memory_codec         how rows are stored, in RAM and in files: "fp32", "bf16", "bf16-stochastic", "fp8", "int8" or
                         "int4"; see byrote.tables.codecs
    address              the AddressSpec that follows from these and the vocabulary map, as a dict; filled in if absent

    num_streams          residual streams; 1 is the plain residual
    stream_connection    with more: "mhc" (as DeepSeek-V4), "mhc_paper" or "hc"; see byrote.nn.hyper

Row width times heads times orders is the paper's d_mem (table 5: 1280); the demo's `n_embed_per_ngram` is row width
times heads.
"""

from __future__ import annotations

from typing import Any, NoReturn, Self

import numpy as np

from byrote.address import AddressSpec, deepseek_v41, engram
from byrote.tables.codecs import CODECS


class MemoryConfig:
    """A mixin: the config sets the fields, those of memories by `_set_memory(locals())`, and calls the checks and, with
    memories, `_settle_address`. `presets` are its named shapes.

    No subclass of PreTrainedConfig, which would take the annotations for fields of its own to fill in.
    """

    presets: dict[str, dict[str, Any]]
    vocab_size: int
    hidden_size: int
    use_cache: bool
    num_streams: int
    stream_connection: str
    memory_layers: list[int]
    memory_contract: str
    memory_table_sizes: list[int]
    memory_heads: int
    memory_row_width: int
    memory_pad_token_id: int
    memory_seed: int
    memory_gate: bool = True
    memory_fusion: str = "streams"
    memory_codec: str
    memory_kernel_size: int
    memory_zero_gate_rule: str
    memory_bias: bool
    memory_initializer_range: float
    initializer_range: float
    address: dict[str, Any] | None

    @classmethod
    def from_preset(cls, name: str, *, vocabulary: np.ndarray | None = None, **overrides: Any) -> Self:
        """A named shape with some fields changed.

        `vocabulary`: the map of `byrote.address.compress(tokenizer)`; it sets `vocab_size` and the addresses.
        """
        if name not in cls.presets:
            raise ValueError(f"preset must be one of {sorted(cls.presets)}, got {name!r}")
        if vocabulary is not None:
            overrides.setdefault("vocab_size", len(vocabulary))
        return cls(**{**cls.presets[name], **overrides}, vocabulary=vocabulary)  # type: ignore[call-arg]

    def _set_memory(self, given: dict[str, Any]) -> None:
        """Take the fields of memories from the arguments of `__init__`."""
        for field in MemoryConfig.__annotations__:
            if field.startswith("memory_") and field in given:
                setattr(self, field, given[field])
        self.memory_layers = list(given["memory_layers"] or [])
        self.memory_table_sizes = (
            [1024, 1024] if given["memory_table_sizes"] is None else [*given["memory_table_sizes"]]
        )

    @property
    def spec(self) -> AddressSpec | None:
        """The addresses of all memories; None without any."""
        return AddressSpec.from_dict(self.address) if self.memory_layers and self.address else None

    @property
    def memory_size(self) -> int:
        """d_mem: values that one token reads in one layer."""
        return len(self.memory_table_sizes) * self.memory_heads * self.memory_row_width

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

    def _refuse(self, field: str, remedy: str) -> NoReturn:
        raise ValueError(f"{field}={getattr(self, field)!r}: {remedy}")

    def _check_streams(self) -> None:
        if self.num_streams < 1:
            self._refuse("num_streams", "at least 1, which is the plain residual; the paper has 4")
        if self.stream_connection not in ("mhc", "mhc_paper", "hc"):
            self._refuse("stream_connection", "must be 'mhc', 'mhc_paper' or 'hc'")

    def _check_memory(self, num_layers: int) -> None:
        refuse = self._refuse
        if sorted(set(self.memory_layers)) != self.memory_layers or any(
            not 0 <= layer < num_layers for layer in self.memory_layers
        ):
            refuse("memory_layers", f"ascending block numbers in 0..{num_layers - 1}, each once")
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
