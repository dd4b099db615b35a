"""MemoryConfig: what the configs of all models with memories and residual streams share.

    memory_layers        zero-based blocks with a memory; [] is the model without any
    memory_contract      "engram" (paper and demo) or "deepseek_v41"
    memory_table_sizes   rows wanted in each head's table, one number per order 2, 3, ...: primes from there on
    memory_heads         hash heads per order;  memory_row_width: values in one row
    memory_pad_token_id  raw id that stands before a document;  memory_seed: of the multipliers
    memory_kernel_size   taps of the short convolution (0: none); its dilation is the highest order
    memory_zero_gate_rule, memory_bias, memory_initializer_range: see byrote.nn.engram and byrote.tables.placements.ram
    memory_codec         how rows are stored, in RAM and in files: "fp32", "bf16", "bf16-stochastic", "fp8", "int8" or
                         "int4"; see byrote.tables.codecs
    address              the AddressSpec that follows from these and the vocabulary map, as a dict; filled in if absent

    num_streams          residual streams; 1 is the plain residual
    stream_connection    with more: "mhc" (as DeepSeek-V4), "mhc_paper" or "hc"; see byrote.nn.hyper

Row width times heads times orders is the paper's d_mem (table 5: 1280); the demo's `n_embed_per_ngram` is row width
times heads.
"""

import dataclasses
import math
from typing import Any, ClassVar, NoReturn, Self

import numpy as np
from huggingface_hub.dataclasses import type_validator
from transformers import PreTrainedConfig

from byrote.address import CONTRACTS, AddressSpec
from byrote.address.vocabulary import resize
from byrote.models.words import EPSILONS, OF_GENERATION, ROPE, SETTLED, check_word, is_known, nearest, rope_fields
from byrote.tables.codecs import CODECS

# Annotations are objects here, and in the files of subclasses, because transformers reads them: no
# `from __future__ import annotations`.


class MemoryConfig(PreTrainedConfig):
    """`presets` are the named shapes of a subclass; `vocabulary`, an argument and no field, sets the addresses."""

    presets: ClassVar[dict[str, dict[str, Any]]]
    memory_fusion: ClassVar[str] = "streams"  # what a family has that offers no other
    auto_map: ClassVar[dict[str, str]] = {}  # no code beside the weights; TRL reads it of any model that it opens
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 512
    hidden_size: int = 64
    num_attention_heads: int = 4
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 8
    v_head_dim: int = 16
    intermediate_size: int = 192
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 32
    shared_expert_intermediate_size: int = 32
    router_bias_update_rate: float = 0.001
    balance_loss_alpha: float = 1e-4
    num_streams: int = 1
    stream_connection: str = "mhc"
    memory_layers: list[int] = dataclasses.field(default_factory=list)
    memory_contract: str = "engram"
    memory_table_sizes: list[int] = dataclasses.field(default_factory=lambda: [1024, 1024])
    memory_heads: int = 2
    memory_row_width: int = 8
    memory_pad_token_id: int = 2
    memory_seed: int = 0
    memory_codec: str = "fp32"
    memory_kernel_size: int = 4
    memory_zero_gate_rule: str = "sign"
    memory_bias: bool = False
    memory_initializer_range: float = 0.02
    address: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    pad_token_id: int | None = 2
    use_cache: bool = True

    def __post_init__(self, vocabulary: np.ndarray | None = None, **words: Any) -> None:
        self.memory_layers = list(self.memory_layers or [])
        self.memory_table_sizes = [1024, 1024] if self.memory_table_sizes is None else list(self.memory_table_sizes)
        super().__post_init__(**self._read(words))
        self.check(vocabulary)

    def _read(self, words: dict[str, Any]) -> dict[str, Any]:
        """Take what is said in the words of others; return what is for transformers to read."""
        for name in ROPE:
            for field, value in rope_fields(words.get(name) or {}, self.max_position_embeddings).items():
                if not hasattr(self, field):
                    raise ValueError(f"{name}={words[name]!r}: a {type(self).__name__} has no {field}; leave it out")
                setattr(self, field, value)
        implied = {"model_type": self.model_type, **self._implied()}
        for name, value in words.items():
            check_word(name, value, implied, self.own_fields())
        return {name: value for name, value in words.items() if is_known(name) and name not in {*ROPE, *SETTLED}}

    def _implied(self) -> dict[str, Any]:
        """Words of other families, and what follows for them from our fields."""
        shared = self.shared_expert_intermediate_size / max(1, self.moe_intermediate_size)
        return {"n_shared_experts": shared, **dict.fromkeys(EPSILONS, self.rms_norm_eps)}

    def check(self, vocabulary: np.ndarray | None = None) -> None:
        """ValueError or TypeError where fields cannot be, or not together; derive the addresses if they are not there.

        A model calls it too, since fields may have been set after the config was made.
        """
        for name, kind in self.own_fields().items():
            value = getattr(self, name)
            type_validator(name, _with_floats(value) if "float" in str(kind) else value, kind)
        for name in ("router_bias_update_rate", "balance_loss_alpha", "initializer_range", "memory_initializer_range"):
            if not 0 <= getattr(self, name) < math.inf:
                self._refuse(name, "a finite number, 0 or more")
        for name in ("rope_theta", "rms_norm_eps", "max_position_embeddings", "vocab_size"):
            if not 0 < getattr(self, name) < math.inf:
                self._refuse(name, "a finite number above 0")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            if any(each < 0 for each in (ids if isinstance(ids, list) else [ids]) if each is not None):
                self._refuse(name, f"a token id below vocab_size={self.vocab_size}, or None for no such token")
        self._check()
        if self.memory_layers:
            self._settle_address(vocabulary)

    def _check(self) -> None:
        """ValueError where fields cannot be, or not together."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but what is given beside a file is checked together with what is in it.

        Of the file, a word that is like no field is kept: tools leave notes of their own there.
        """
        fields = cls.own_fields()
        beside = {name: kwargs.pop(name) for name in (*fields, *ROPE, *SETTLED) if name in kwargs}
        said, common = {**config_dict, **beside}, {each.name for each in dataclasses.fields(cls)}
        notes = {
            name: said.pop(name)
            for name in list(said)
            if not (name in common or name in OF_GENERATION or is_known(name) or nearest(name, fields, cutoff=0.8))
        }
        found = super().from_dict(said, **kwargs)
        for name, value in notes.items():
            setattr(found[0] if isinstance(found, tuple) else found, name, value)
        return found

    @classmethod
    def own_fields(cls) -> dict[str, Any]:
        """The fields of this config, and their types, without those that every config of transformers has."""
        common = {each.name for each in dataclasses.fields(PreTrainedConfig)}
        return {each.name: each.type for each in dataclasses.fields(cls) if each.name not in common}

    @classmethod
    def from_preset(cls, name: str, *, vocabulary: np.ndarray | None = None, **overrides: Any) -> Self:
        """A named shape with some fields changed.

        `vocabulary`: the map of `byrote.address.compress(tokenizer)`; it sets `vocab_size` and the addresses.
        """
        if name not in cls.presets:
            raise ValueError(f"preset must be one of {sorted(cls.presets)}, got {name!r}")
        if vocabulary is not None:
            overrides.setdefault("vocab_size", len(vocabulary))
        return cls(**{**cls.presets[name], **overrides, "vocabulary": vocabulary})

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
            vocabulary = np.arange(self.vocab_size) if vocabulary is None else np.asarray(vocabulary)
            if len(vocabulary) > self.vocab_size:
                raise ValueError(
                    f"vocabulary maps {len(vocabulary)} ids, vocab_size is {self.vocab_size}: it must be as "
                    "many or more"
                )
            spec = self._make_spec(vocabulary)
            if len(vocabulary) < self.vocab_size:  # an embedding wider than its tokenizer
                spec = spec.resized(resize(vocabulary, self.vocab_size, spec.most_classes))
            self.address = spec.to_dict()
        settled = self.spec
        assert settled is not None
        claims = {
            "memory_contract": (self.memory_contract, settled.contract),
            "memory_layers": (self.memory_layers, [layer.layer_id for layer in settled.layers]),
            "memory_heads": (self.memory_heads, settled.heads),
            "memory_table_sizes": (len(self.memory_table_sizes) + 1, settled.max_order),
            "memory_seed": (self.memory_seed, settled.seed),
            "vocab_size": (self.vocab_size, settled.vocab_size),
        }
        for field, (configured, addressed) in claims.items():
            if configured != addressed:
                raise ValueError(
                    f"{field} says {configured}, the address spec {addressed}: drop `address` to derive it anew, "
                    "or give back the fields that it was made with"
                )
        # The sizes do not depend on the vocabulary, so any will do.
        expected = [layer.primes for layer in self._make_spec(np.arange(self.vocab_size)).layers]
        if expected != [layer.primes for layer in settled.layers]:
            raise ValueError(
                f"memory_table_sizes={self.memory_table_sizes} would give layers of "
                f"{[sum(map(sum, primes)) for primes in expected]} rows, the address spec has "
                f"{[layer.rows for layer in settled.layers]}: drop `address` to derive it anew, or give back the sizes"
            )

    def _make_spec(self, vocabulary: np.ndarray) -> AddressSpec:
        common: dict[str, Any] = {
            "heads": self.memory_heads,
            "layer_ids": self.memory_layers,
            "pad_id": self.memory_pad_token_id,
            "table_sizes": self.memory_table_sizes,
            "seed": self.memory_seed,
        }
        try:
            return CONTRACTS[self.memory_contract].build(vocabulary, **common)
        except ValueError as error:
            self._refuse("memory_contract", str(error))

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
        if self.memory_contract not in CONTRACTS:
            refuse("memory_contract", f"must be one of {', '.join(map(repr, CONTRACTS))}")
        if not self.memory_table_sizes or min(self.memory_table_sizes) < 1:
            refuse("memory_table_sizes", "one positive number of rows per order, for orders 2, 3, ...")
        for field in ("memory_heads", "memory_row_width"):
            if getattr(self, field) < 1:
                refuse(field, "must be at least 1")
        if self.memory_codec not in CODECS:
            refuse("memory_codec", f"must be one of {sorted(CODECS)}")
        if self.memory_zero_gate_rule not in ("sign", "copysign"):
            refuse("memory_zero_gate_rule", "must be 'sign' or 'copysign'")
        if not 0 <= self.memory_pad_token_id < self.vocab_size:
            refuse("memory_pad_token_id", f"a token id below vocab_size={self.vocab_size}")
        if self.memory_kernel_size < 0:
            refuse("memory_kernel_size", "0 or more taps of the short convolution")


def _with_floats(value: Any) -> Any:
    """Whole numbers will do for floats."""
    if isinstance(value, dict):
        return {name: _with_floats(part) for name, part in value.items()}
    return float(value) if type(value) is int else value
