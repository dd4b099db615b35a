"""AddressSpec: all the integers that take token ids to row ids, frozen, versioned, with a digest.

Row of column (order n, head k) at position t, for compressed ids x (Engram paper section 2.2, equations 1 and
2):

    mix_n = XOR over j < n of x[t - j] * multipliers[j]        int64
    row   = mix_n mod primes[n - 2][k] + offset of the column

Columns are order-major and head-minor. `offsets` is the exclusive prefix sum of the primes: one table per
layer holds all its columns. A specification is built by its contract (`contracts/`) and checked on construction and
on reading: whatever would give wrong rows (an overflow, a changed vocabulary) or breaks a promise of the contract (a
repeated or composite modulus) is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from byrote.address.vocabulary import vocabulary_digest

FORMAT_VERSION = 1
DEAD = int(np.iinfo(np.int64).min)  # the canonical id of what is no token: padding, and what lies before a document


@dataclass(frozen=True)
class LayerAddress:
    """One memory layer: `multipliers` [max_order], `primes` [max_order - 1][heads]."""

    layer_id: int
    multipliers: tuple[int, ...]
    primes: tuple[tuple[int, ...], ...]

    @property
    def moduli(self) -> tuple[int, ...]:
        """The primes, one per column."""
        return tuple(itertools.chain.from_iterable(self.primes))

    @property
    def offsets(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(self.moduli[:-1], initial=0))

    @property
    def rows(self) -> int:
        return sum(self.moduli)

    @property
    def columns(self) -> int:
        return len(self.moduli)


class Contract(NamedTuple):
    """`build(vocabulary, *, table_sizes, heads, layer_ids, pad_id, seed)` makes a specification; `check` refuses one
    that breaks what the contract promises of its integers, with ValueError.
    """

    build: Callable[..., AddressSpec]
    check: Callable[[AddressSpec], None]


CONTRACTS: dict[str, Contract] = {}  # by name: `byrote.address.contracts`


@dataclass(frozen=True)
class AddressSpec:
    """The addresses of all memories of a model; ValueError where they would give wrong rows. `digest` names it."""

    contract: str
    format_version: int
    vocab_size: int  # raw ids 0 .. vocab_size - 1
    compressed_vocab_size: int
    pad_id: int  # compressed
    max_order: int
    heads: int
    seed: int
    vocabulary_digest: str
    layers: tuple[LayerAddress, ...]

    def __post_init__(self) -> None:
        require(self.contract in CONTRACTS, "contract", self.contract, f"one of {', '.join(CONTRACTS)}")
        require(self.format_version == FORMAT_VERSION, "format_version", self.format_version, f"{FORMAT_VERSION}")
        for name in ("vocab_size", "compressed_vocab_size", "pad_id", "max_order", "heads", "seed"):
            require(type(getattr(self, name)) is int, name, getattr(self, name), "an integer")
        classes = self.compressed_vocab_size
        require(
            0 < classes <= self.vocab_size,
            "compressed_vocab_size",
            classes,
            f"1 .. vocab_size ({self.vocab_size})",
        )
        require(
            0 <= self.pad_id < classes,
            "pad_id",
            self.pad_id,
            f"0 .. compressed_vocab_size - 1 ({classes - 1})",
        )
        require(self.max_order >= 2, "max_order", self.max_order, "at least 2")
        require(self.heads >= 1, "heads", self.heads, "at least 1")
        require(_is_digest(self.vocabulary_digest), "vocabulary_digest", self.vocabulary_digest, "64 hex digits")
        require(len(self.layers) > 0, "layers", self.layers, "at least one layer")
        layer_ids = [layer.layer_id for layer in self.layers]
        require(len(set(layer_ids)) == len(layer_ids), "layers", layer_ids, "distinct layer ids")
        for layer in self.layers:
            self._check_layer(layer)
        CONTRACTS[self.contract].check(self)

    def _check_layer(self, layer: LayerAddress) -> None:
        where = f"layer {layer.layer_id}"
        require(
            type(layer.layer_id) is int and layer.layer_id >= 0,
            "layer_id",
            layer.layer_id,
            "an integer from 0",
        )
        multipliers = layer.multipliers
        require(
            len(multipliers) == self.max_order
            and all(type(m) is int and m > 0 for m in multipliers),
            f"{where} multipliers", multipliers, f"{self.max_order} positive integers",
        )  # fmt: skip
        require(
            (self.compressed_vocab_size - 1) * max(multipliers) < 2**63,
            f"{where} multipliers", multipliers, "small enough that no product with an id reaches 2^63",
        )  # fmt: skip
        require(
            [len(order) for order in layer.primes] == [self.heads] * (self.max_order - 1),
            f"{where} primes", layer.primes, f"{self.max_order - 1} orders of {self.heads} heads",
        )  # fmt: skip
        require(
            all(type(p) is int and 0 < p < 2**63 for p in layer.moduli),
            f"{where} primes", layer.primes, "integers from 1, below 2^63",
        )  # fmt: skip

    @property
    def orders(self) -> range:
        return range(2, self.max_order + 1)

    @property
    def columns(self) -> int:
        return (self.max_order - 1) * self.heads

    @property
    def most_classes(self) -> int:
        """How many classes these multipliers leave room for: no product of them with an id reaches 2^63."""
        return (2**63 - 1) // max(max(layer.multipliers) for layer in self.layers) + 1

    def resized(self, vocabulary: np.ndarray) -> AddressSpec:
        """The same multipliers and primes, so the same rows of all ids that stay, for another length of the map."""
        return dataclasses.replace(
            self,
            vocab_size=len(vocabulary),
            compressed_vocab_size=int(vocabulary.max()) + 1,
            vocabulary_digest=vocabulary_digest(vocabulary),
        )

    def layer(self, layer_id: int) -> LayerAddress:
        for layer in self.layers:
            if layer.layer_id == layer_id:
                return layer
        raise ValueError(f"layer_id is {layer_id}; this specification has {[a.layer_id for a in self.layers]}")

    def check_vocabulary(self, vocabulary: np.ndarray) -> None:
        """Refuse a raw-to-compressed map other than the one that this specification was built for."""
        found = vocabulary_digest(vocabulary)
        if len(vocabulary) != self.vocab_size or found != self.vocabulary_digest:
            raise ValueError(
                f"the vocabulary map has digest {found} and {len(vocabulary)} ids, the address spec was made for "
                f"{self.vocabulary_digest} and {self.vocab_size}: pass the map of the tokenizer that the tables were "
                "made with"
            )

    @property
    def digest(self) -> str:
        canonical = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types. Multipliers may exceed 2^53: read them as 64-bit integers, not as doubles."""
        return json.loads(json.dumps(dataclasses.asdict(self))) | {"digest": self.digest}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AddressSpec:
        expected = {field.name for field in dataclasses.fields(cls)} | {"digest"}
        if set(data) != expected:
            raise ValueError(
                f"address specification lacks the fields {sorted(expected - set(data))} and has the unknown "
                f"fields {sorted(set(data) - expected)}; write it with AddressSpec.to_dict"
            )
        fields = {name: value for name, value in data.items() if name not in ("digest", "layers")}
        try:
            layers = tuple(
                LayerAddress(
                    layer_id=layer["layer_id"],
                    multipliers=tuple(layer["multipliers"]),
                    primes=tuple(tuple(order) for order in layer["primes"]),
                )
                for layer in data["layers"]
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"layers is malformed ({error}); each needs layer_id, multipliers [max_order], primes [orders][heads]"
            ) from error
        spec = cls(layers=layers, **fields)
        if spec.digest != data["digest"]:
            raise ValueError(
                f"digest is {data['digest']}, but the fields give {spec.digest}; "
                "the specification was changed after it was written: restore it, or build it anew"
            )
        return spec


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def require(condition: bool, field: str, value: Any, remedy: str) -> None:
    """ValueError that says what the field must be, unless the condition holds."""
    if not condition:
        raise ValueError(f"{field} is {value!r}; it must be {remedy}")
