"""The contract `engram`: the paper (arXiv 2601.07372, section 2.2) as the released demo code fixes it.

    B    = max(1, floor(floor((2^63 - 1) / C) / 2)), C = number of compressed classes
    m_j  = 2 r_j + 1, r = numpy default_rng(seed + 10007 * layer_id).integers(0, B, size = max_order)
    primes: for each layer in the order given, for each order ascending, `heads` times the smallest prime
            that is at least the order's table size and used nowhere before in the model

So no product of an id below C and a multiplier overflows; primes depend on the order of `layer_ids`,
multipliers do not; and one changed class changes every multiplier.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from byrote.address.spec import FORMAT_VERSION, AddressSpec, LayerAddress, require
from byrote.address.vocabulary import vocabulary_digest


def engram(
    vocabulary: np.ndarray,
    *,
    table_sizes: Sequence[int],
    heads: int,
    layer_ids: Sequence[int],
    pad_id: int,
    seed: int = 0,
    contract: str = "engram",
) -> AddressSpec:
    """`table_sizes`: rows wanted per head, one number for each order from 2 on; `pad_id`: the raw id before a document.

    `contract`: the name of another one with the same integers.
    """
    vocabulary = np.asarray(vocabulary)
    classes = _count_classes(vocabulary)
    if not 0 <= pad_id < len(vocabulary):
        raise ValueError(f"pad_id is {pad_id}; give a raw token id in 0 .. {len(vocabulary) - 1}")
    if heads < 1 or not len(table_sizes) or min(table_sizes) < 1:
        raise ValueError(
            f"heads is {heads} and table_sizes {list(table_sizes)}; give at least 1 of each, a size an order from 2 on"
        )
    if seed < 0 or any(layer_id < 0 for layer_id in layer_ids):
        raise ValueError(f"seed is {seed} and layer_ids {list(layer_ids)}; none may be negative")
    taken: set[int] = set()
    max_order = len(table_sizes) + 1
    layers = tuple(
        LayerAddress(
            layer_id=layer_id,
            multipliers=draw_multipliers(classes, max_order, layer_id, seed),
            primes=tuple(_next_primes(size, heads, taken) for size in table_sizes),
        )
        for layer_id in layer_ids
    )
    return AddressSpec(
        contract=contract,
        format_version=FORMAT_VERSION,
        vocab_size=len(vocabulary),
        compressed_vocab_size=classes,
        pad_id=int(vocabulary[pad_id]),
        max_order=max_order,
        heads=heads,
        seed=seed,
        vocabulary_digest=vocabulary_digest(vocabulary),
        layers=layers,
    )


def multiplier_half_bound(compressed_vocab_size: int) -> int:
    return max(1, (2**63 - 1) // compressed_vocab_size // 2)


def draw_multipliers(compressed_vocab_size: int, max_order: int, layer_id: int, seed: int) -> tuple[int, ...]:
    generator = np.random.default_rng(seed + 10007 * layer_id)
    draws = generator.integers(0, multiplier_half_bound(compressed_vocab_size), size=max_order, dtype=np.int64)
    return tuple(2 * int(draw) + 1 for draw in draws)


def check(spec: AddressSpec) -> None:
    """ValueError unless multipliers are odd and moduli are prime, ascending within an order, and used once."""
    seen: set[int] = set()
    for layer in spec.layers:
        where = f"layer {layer.layer_id}"
        multipliers, primes = layer.multipliers, layer.primes
        require(all(m % 2 for m in multipliers), f"{where} multipliers", multipliers, f"{spec.max_order} odd integers")
        require(all(is_prime(p) for p in layer.moduli), f"{where} primes", primes, "primes below 2^63")
        ascending = all(a < b for order in primes for a, b in itertools.pairwise(order))
        require(ascending, f"{where} primes", primes, "ascending within an order")
        unique = len(set(layer.moduli)) == layer.columns and seen.isdisjoint(layer.moduli)
        require(unique, f"{where} primes", primes, "unique over all orders and layers")
        seen.update(layer.moduli)


def _next_primes(at_least: int, count: int, taken: set[int]) -> tuple[int, ...]:
    """The `count` smallest primes from `at_least` on that are not taken; takes them."""
    free = (number for number in itertools.count(at_least) if number not in taken and is_prime(number))
    primes = tuple(itertools.islice(free, count))
    taken.update(primes)
    return primes


def _count_classes(vocabulary: np.ndarray) -> int:
    if vocabulary.ndim != 1 or len(vocabulary) == 0 or not np.issubdtype(vocabulary.dtype, np.integer):
        raise ValueError(
            f"vocabulary is {vocabulary.dtype} {list(vocabulary.shape)}; "
            "give the integer map [vocab_size] that compress() returns"
        )
    classes = np.unique(vocabulary)
    if classes[0] != 0 or classes[-1] != len(classes) - 1:
        raise ValueError(
            f"vocabulary has {len(classes)} classes between {classes[0]} and {classes[-1]}; "
            "classes must be numbered 0, 1, 2, ... without a gap"
        )
    return len(classes)


def is_prime(number: int) -> bool:
    """Miller-Rabin with the first twelve primes as bases, which decides every number below 3.3e24."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if number < 2 or any(number % base == 0 for base in bases):
        return number in bases
    twos = ((number - 1) & -(number - 1)).bit_length() - 1
    odd = (number - 1) >> twos
    for base in bases:
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        if not any((power := power * power % number) == number - 1 for _ in range(twos - 1)):
            return False
    return True
