import dataclasses
import json

import numpy as np
import pytest

from byrote.address import AddressSpec, deepseek_v41, engram
from byrote.address.contracts.engram import draw_multipliers, is_prime, multiplier_half_bound

IDENTITY = np.arange(1000)


def small(**changes):
    arguments = dict(table_sizes=[50, 60], heads=3, layer_ids=[1, 4], pad_id=2) | changes
    return engram(IDENTITY, **arguments)


def case_spec(case, vocabulary):
    config = case["config"]
    return engram(
        vocabulary,
        table_sizes=config["engram_vocab_size"],
        heads=config["n_head_per_ngram"],
        layer_ids=config["layer_ids"],
        pad_id=config["pad_id"],
        seed=config["seed"],
    )


def test_golden_constants(golden):
    """All multipliers, primes, offsets and totals: they need the class count and the pad alone."""
    for case in golden["cases"]:
        classes = np.arange(case["compressed_vocab_size"])  # stands in for tokenizers that are not installed
        case = case | {"config": case["config"] | {"pad_id": case["compressed_pad_id"]}}
        spec = case_spec(case, classes)
        assert multiplier_half_bound(spec.compressed_vocab_size) == case["multiplier_half_bound"]
        for layer in spec.layers:
            expected = case["layers"][str(layer.layer_id)]
            assert list(layer.multipliers) == expected["multipliers"], case["name"]
            assert [list(order) for order in layer.primes] == expected["primes"], case["name"]
            assert list(layer.offsets) == expected["offsets"], case["name"]
            assert layer.rows == expected["total_rows"], case["name"]


def test_published_row_counts_of_v41():
    spec = deepseek_v41(np.arange(99092), table_sizes=[16_000_000] * 3, heads=8, layer_ids=[1, 14], pad_id=2)
    assert [layer.rows for layer in spec.layers] == [384006168, 384016682]
    assert spec.columns == 24 and list(spec.orders) == [2, 3, 4]


def test_multipliers_ignore_the_order_of_layers_and_primes_do_not():
    forward, backward = small(), small(layer_ids=[4, 1])
    assert forward.layer(4).multipliers == backward.layer(4).multipliers
    assert forward.layer(4).primes == backward.layer(1).primes


def test_is_prime():
    sieve = [n for n in range(2000) if n > 1 and all(n % k for k in range(2, int(n**0.5) + 1))]
    assert [n for n in range(2000) if is_prime(n)] == sieve
    assert is_prime(2**61 - 1) and not is_prime((2**31 - 1) * (2**31 - 19)) and not is_prime(3215031751)


def test_json_round_trip_and_digest():
    spec = small()
    written = json.loads(json.dumps(spec.to_dict()))
    assert AddressSpec.from_dict(written) == spec
    assert written["digest"] == spec.digest != small(seed=1).digest
    written["pad_id"] = 3
    changed = dataclasses.replace(spec, pad_id=3)
    with pytest.raises(ValueError) as error:
        AddressSpec.from_dict(written)
    assert spec.digest in str(error.value) and changed.digest in str(error.value)


@pytest.mark.parametrize("field", ["seed", "digest", "layers"])
def test_a_missing_or_unknown_field_is_named(field):
    data = small().to_dict()
    data["colour"] = data.pop(field)
    with pytest.raises(ValueError, match=rf"{field}.*colour"):
        AddressSpec.from_dict(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("contract", "other"),
        ("format_version", 2),
        ("compressed_vocab_size", 1001),
        ("compressed_vocab_size", 0),
        ("pad_id", -1),
        ("pad_id", 1000),
        ("max_order", 1),
        ("max_order", 4),
        ("heads", 2),
        ("heads", 3.0),
        ("vocabulary_digest", "0"),
        ("layers", ()),
    ],
)
def test_a_contradiction_is_refused(field, value):
    with pytest.raises(ValueError, match="it must be"):
        dataclasses.replace(small(), **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("multipliers", (3, 4, 5), "odd"),
        ("multipliers", (3, 5), "3 positive"),
        ("multipliers", (1, 3, 2**55 - 1), "2\\^63"),
        ("primes", ((53, 59, 61), (67, 71, 72)), "primes below"),
        ("primes", ((59, 53, 61), (67, 71, 73)), "ascending"),
        ("primes", ((53, 59, 61), (61, 67, 71)), "unique"),
        ("primes", ((53, 59, 61),), "2 orders of 3 heads"),
        ("layer_id", 4, "distinct"),
        ("layer_id", "1", "an integer"),
    ],
)
def test_a_bad_layer_is_refused(field, value, message):
    spec = small()
    broken = dataclasses.replace(spec.layers[0], **{field: value})
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(spec, layers=(broken, spec.layers[1]))


def test_primes_are_unique_over_layers():
    spec = small()
    with pytest.raises(ValueError, match="unique over all"):
        dataclasses.replace(spec, layers=(spec.layers[0], dataclasses.replace(spec.layers[0], layer_id=9)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_id": 1000}, "pad_id"),
        ({"table_sizes": []}, "table_sizes"),
        ({"table_sizes": [50, 0]}, "at least 1"),
        ({"heads": 0}, "heads"),
        ({"seed": -1}, "seed"),
        ({"layer_ids": [-1]}, "negative"),
        ({"layer_ids": [1, 1]}, "distinct"),
    ],
)
def test_a_builder_names_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize(
    "vocabulary", [np.array([0, 2]), np.array([1, 2]), np.array([[0]]), np.array([0.0]), np.array([], int)]
)
def test_a_map_that_is_no_numbering_of_classes_is_refused(vocabulary):
    with pytest.raises(ValueError, match="vocabulary"):
        engram(vocabulary, table_sizes=[5, 5], heads=1, layer_ids=[0], pad_id=0)


def test_check_vocabulary_names_both_digests():
    spec, other = small(), np.arange(1000)[::-1]
    spec.check_vocabulary(IDENTITY)
    with pytest.raises(ValueError, match=spec.vocabulary_digest):
        spec.check_vocabulary(other)
    with pytest.raises(ValueError, match="and 999 ids"):
        spec.check_vocabulary(IDENTITY[:999])


def test_unknown_layer_is_named():
    with pytest.raises(ValueError, match=r"\[1, 4\]"):
        small().layer(2)


@pytest.mark.parametrize(("classes", "layer_id", "seed"), [(98627, 1, 0), (99092, 14, 0), (3, 2, 12345)])
def test_multipliers_from_integers_alone(classes, layer_id, seed):
    """The generator as docs/formats.md gives it to engines without NumPy."""
    word = [int(w) for w in np.random.SeedSequence(seed + 10007 * layer_id).generate_state(4, np.uint64)]
    factor, mask = 0x2360ED051FC65DA44385DF649FCCF645, 2**128 - 1
    increment = ((word[2] << 64 | word[3]) << 1 | 1) & mask
    state = (increment + (word[0] << 64 | word[1])) * factor + increment & mask
    bound, drawn = multiplier_half_bound(classes), []
    while len(drawn) < 4:
        state = state * factor + increment & mask
        mixed, rotation = (state >> 64 ^ state) % 2**64, state >> 122
        output = (mixed >> rotation | mixed << (-rotation % 64)) % 2**64
        if output * bound % 2**64 >= 2**64 % bound:
            drawn.append(2 * (output * bound >> 64) + 1)
    assert tuple(drawn) == draw_multipliers(classes, 4, layer_id, seed)
