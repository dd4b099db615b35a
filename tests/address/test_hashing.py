"""The fast path against golden vectors and a twin in Python integers; every way to cut a batch into calls."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.address import DEAD, canonical_ids, deepseek_v41, engram, hash_rows, hash_windows, next_tail, windows
from byrote.address.hashing import plain_windows

RAW, CLASSES = 60, 40
VOCABULARY = np.arange(RAW) % CLASSES
SPECS = {
    order: engram(
        VOCABULARY,
        table_sizes=[50 + n for n in range(order - 1)],
        heads=2,
        layer_ids=[1, 6],
        pad_id=5,
    )
    for order in (2, 3, 4)
}


def slow_rows(compressed, alive, starts, layer, pad_id):
    """One row of a batch, one Python integer at a time: the definition."""
    rows = []
    for now in range(len(compressed)):
        window, place = [], now
        while len(window) < len(layer.multipliers) and place >= 0 and alive[place]:
            window.append(int(compressed[place]))
            if starts[place]:
                break
            place -= 1
        window += [pad_id] * (len(layer.multipliers) - len(window))
        offset, columns = 0, []
        for order, primes in enumerate(layer.primes, start=2):
            mix = 0
            for token, multiplier in zip(window[:order], layer.multipliers, strict=False):
                mix ^= token * multiplier
            for prime in primes:
                columns.append(mix % prime + offset)
                offset += prime
        rows.append(columns)
    return rows


def both(*arrays):
    """The same arguments for NumPy and for torch."""
    yield arrays
    yield tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def fast_rows(ids, starts, spec, layer, tail=None):
    seen = windows(ids, starts, tail, spec.max_order)
    rows = hash_windows(seen, layer, spec.pad_id)
    if isinstance(seen, torch.Tensor):
        assert torch.equal(hash_rows(seen, layer, spec.pad_id), rows)
    return np.asarray(rows)


def test_golden_hashes(golden):
    for case in golden["cases"]:
        config = case["config"] | {"pad_id": case["compressed_pad_id"]}
        spec = engram(
            np.arange(case["compressed_vocab_size"]),
            table_sizes=config["engram_vocab_size"],
            heads=config["n_head_per_ngram"],
            layer_ids=config["layer_ids"],
            pad_id=config["pad_id"],
            seed=config["seed"],
        )
        for (ids,) in both(np.array(case["compressed_ids"])):
            for layer in spec.layers:
                rows = fast_rows(ids, ids != ids, spec, layer)
                expected = np.array(case["layers"][str(layer.layer_id)]["hashes"]) + np.array(layer.offsets)
                assert (rows == expected).all(), (case["name"], layer.layer_id)


@pytest.mark.parametrize("name", ["synthetic_tok", "reference_default", "v41_flash_layout", "n3_h4"])
def test_golden_compressed_ids(golden, vocabulary, name):
    case = next(case for case in golden["cases"] if case["name"] == name)
    for lookup, ids in both(vocabulary(case["tokenizer"]), np.array(case["input_ids"])):
        assert np.array_equal(canonical_ids(lookup, ids), case["compressed_ids"])


def test_golden_dead_tokens_of_v41(golden, vocabulary):
    [case] = golden["v41"]
    config, lookup = case["config"], vocabulary("deepseek-v4")
    spec = deepseek_v41(
        lookup,
        table_sizes=[config["engram_vocab_size"]] * (config["engram_max_ngram_size"] - 1),
        heads=config["engram_n_heads"],
        layer_ids=config["engram_layer_ids"],
        pad_id=config["engram_pad_id"],
    )
    for mapping, ids, alive in both(lookup, np.array(case["input_ids"]), np.array(case["token_mask"])):
        for masked, expected in ((alive, case["rows_masked"]), (alive | True, case["rows_unmasked"])):
            compressed = canonical_ids(mapping, ids, masked)
            for place, layer in enumerate(spec.layers):
                rows = fast_rows(compressed, ids != ids, spec, layer)
                assert (rows == np.array(expected)[:, :, place]).all()


@st.composite
def batches(draw):
    """Raw ids, alive and starts with the rule that a start follows every dead token; cut points."""
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    shape = (rows, tokens)
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    alive = generator.random(shape) > draw(st.sampled_from([0.0, 0.2, 0.6]))
    starts = generator.random(shape) < draw(st.sampled_from([0.0, 0.2]))
    starts[:, 1:] |= ~alive[:, :-1]
    starts[:, 0] = True
    ids = np.where(alive, generator.integers(0, RAW, shape), generator.integers(-9, 2 * RAW, shape))
    cuts = sorted(draw(st.sets(st.integers(1, max(tokens - 1, 1)), max_size=4)))
    return ids, alive, starts, [0, *(cut for cut in cuts if cut < tokens), tokens]


@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from([2, 3, 4]))
def test_equal_to_the_slow_twin_and_in_range(batch, max_order):
    spec, (raw, alive, starts, _) = SPECS[max_order], batch
    for lookup, ids, living, begins in both(VOCABULARY, raw, alive, starts):
        compressed = canonical_ids(lookup, ids, living)
        for layer in spec.layers:
            rows = fast_rows(compressed, begins, spec, layer)
            assert rows.dtype == np.int64 and rows.min() >= 0 and rows.max() < layer.rows
            assert (rows >= np.array(layer.offsets)).all()
            for row in range(len(raw)):
                expected = slow_rows(np.asarray(compressed)[row], alive[row], starts[row], layer, spec.pad_id)
                assert rows[row].tolist() == expected


@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from([2, 3, 4]))
def test_any_chunking_equals_the_whole(batch, max_order):
    raw, alive, starts, cuts = batch
    nothing = np.full((len(raw), max_order - 1), DEAD)
    for ids, begins, tail in both(canonical_ids(VOCABULARY, raw, alive), starts, nothing):
        whole = windows(ids, begins, None, max_order)
        parts = []
        for begin, end in itertools.pairwise(cuts):
            part = ids[:, begin:end], begins[:, begin:end]
            parts.append(np.asarray(windows(*part, tail, max_order)))
            tail = next_tail(*part, tail)
        assert (np.concatenate(parts, 1) == np.asarray(whole)).all()


@settings(deadline=None, max_examples=60)
@given(batches(), st.sampled_from([2, 3, 4]))
def test_padding_leaves_no_trace(batch, max_order):
    """Ragged calls, padded right or left with anything, give the windows and tails of each row alone."""
    raw, _, starts, cuts = batch
    ids = canonical_ids(VOCABULARY, np.abs(raw) % RAW)
    nothing = np.full((len(raw), max_order - 1), DEAD)
    tail, alone = nothing, nothing
    for begin, end in itertools.pairwise(cuts):
        part, begins = ids[:, begin:end], starts[:, begin:end].copy()
        padding, noise = np.full((len(ids), 3), DEAD), np.ones((len(ids), 3), bool)
        expected = windows(part, begins, alone, max_order)
        right = np.concatenate([part, padding], 1), np.concatenate([begins, noise], 1)
        assert (windows(*right, tail, max_order)[:, : end - begin] == expected).all()
        tail, alone = next_tail(*right, tail), next_tail(part, begins, alone)
        assert (tail == alone).all()
        if begin == 0:
            left = np.concatenate([padding, part], 1), np.concatenate([noise, begins], 1)
            assert (windows(*left, nothing, max_order)[:, 3:] == expected).all()
            assert (next_tail(*left, nothing) == alone).all()
    assert (next_tail(*(np.full((len(ids), 2), DEAD), noise[:, :2]), tail) == tail).all()


def test_packed_documents_equal_separate_ones():
    ids = np.random.default_rng(0).integers(0, CLASSES, (1, 9))
    starts = np.zeros((1, 9), bool)
    starts[0, [0, 4, 5]] = True
    packed = windows(ids, starts, None, 3)
    separate = [windows(ids[:, a:b], starts[:, a:b], None, 3) for a, b in ((0, 4), (4, 5), (5, 9))]
    assert (packed == np.concatenate(separate, 1)).all()


def test_a_start_hides_the_tail_and_a_hole_in_the_tail_ends_the_window():
    ids, tail = np.array([[7], [7], [7]]), np.array([[1, 2], [1, 2], [1, DEAD]])
    seen = windows(ids, np.array([[False], [True], [False]]), tail, 3)
    assert seen[:, 0].tolist() == [[7, 2, 1], [7, DEAD, DEAD], [7, DEAD, DEAD]]


def test_ids_at_dead_positions_are_ignored_whatever_they_are():
    alive = np.array([[True, False, False]])
    for lookup, ids, living in both(VOCABULARY, np.array([[45, -100, 10**12]]), alive):
        assert canonical_ids(lookup, ids, living).tolist() == [[5, DEAD, DEAD]]


@pytest.mark.parametrize("bad", [-1, RAW, DEAD])
def test_the_first_id_out_of_range_is_named(bad):
    for lookup, ids in both(VOCABULARY, np.array([[0, 1], [2, bad]])):
        with pytest.raises(ValueError, match=rf"input_ids\[1, 1\] is {bad}; .* 0 \.\. {RAW - 1}"):
            canonical_ids(lookup, ids)


def test_wrong_types_and_shapes_are_refused():
    ids, starts = np.zeros((2, 3), int), np.zeros((2, 3), bool)
    for wrong in (np.float64, np.uint8):  # torch would take uint8 for a mask
        with pytest.raises(ValueError, match=f"dtype {np.dtype(wrong)}"):
            canonical_ids(VOCABULARY, ids.astype(wrong))
    assert canonical_ids(torch.from_numpy(VOCABULARY), torch.ones(1, 2, dtype=torch.int32)).dtype == torch.int64
    with pytest.raises(ValueError, match="alive is int64"):
        canonical_ids(VOCABULARY, ids, ids)
    with pytest.raises(ValueError, match=r"starts is bool \[2, 2\]"):
        windows(ids, starts[:, :2], None, 3)
    with pytest.raises(ValueError, match=r"tail has shape \[2, 3\]"):
        windows(ids, starts, ids, 3)
    with pytest.raises(ValueError, match="max_order = 3"):
        hash_windows(windows(ids, starts, None, 2), SPECS[3].layers[0], 0)
    with pytest.raises(ValueError, match="max_order = 3"):
        hash_rows(torch.zeros(2, 3, 2, dtype=torch.int64), SPECS[3].layers[0], 0)


@pytest.mark.parametrize("shape", [(0, 4), (7, 4), (2, 5, 4), (2, 0, 4)])
def test_the_compiled_hash_of_any_integers(shape):
    """Products that overflow wrap around, and the modulo is the floor modulo, in both."""
    generator = torch.Generator().manual_seed(0)
    seen = torch.empty(shape, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    seen[..., 3][torch.rand(shape[:-1], generator=generator) < 0.3] = DEAD
    for layer in SPECS[4].layers:
        assert torch.equal(hash_rows(seen, layer, 5), hash_windows(seen, layer, 5))
        assert torch.equal(hash_rows(seen.transpose(0, -2), layer, 5), hash_windows(seen.transpose(0, -2), layer, 5))


@settings(max_examples=60, deadline=None)
@given(max_order=st.integers(2, 5), shape=st.tuples(st.integers(0, 3), st.integers(1, 9)), seed=st.integers(0, 2**31))
def test_compiled_windows_are_the_plain_ones(max_order, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = shape
    ids, tail = torch.randint(-5, 5, (rows, tokens + max_order - 1), generator=generator).split(
        [tokens, max_order - 1], 1
    )
    ids, tail = (torch.where(x == 0, DEAD, x) for x in (ids, tail))
    starts = torch.rand(tokens, rows, generator=generator).T < 0.2  # strides of its own
    for behind in (tail, None):
        assert torch.equal(windows(ids, starts, behind, max_order), plain_windows(ids, starts, behind, max_order))


@pytest.mark.parametrize("dead", [None, 0.4])
def test_compiled_canonical_ids_are_the_plain_ones(dead):
    generator = np.random.default_rng(0)
    ids, alive = generator.integers(0, RAW, (5, 7)), None if dead is None else generator.random((5, 7)) >= dead
    expected = canonical_ids(VOCABULARY, ids, alive)
    if alive is not None:
        ids = np.where(alive, ids, 10**12)
    for order in (lambda array: array, lambda array: np.ascontiguousarray(array.T).T):  # with strides of its own too
        there = None if alive is None else torch.from_numpy(order(alive))
        found = canonical_ids(torch.from_numpy(VOCABULARY), torch.from_numpy(order(ids)), there)
        assert (found.numpy() == expected).all()
    with pytest.raises(ValueError, match=r"alive is torch\.int64"):
        canonical_ids(torch.from_numpy(VOCABULARY), torch.zeros(2, 2).long(), torch.ones(2, 2).long())


def test_compiles_as_one_graph():
    spec = SPECS[3]
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, CLASSES, (2, 8)))
    starts, tail = torch.rand(2, 8) < 0.2, torch.full((2, 2), DEAD)

    def run(ids, starts, tail):
        seen = windows(ids, starts, tail, spec.max_order)
        return hash_rows(seen, spec.layers[0], spec.pad_id), next_tail(ids, starts, tail)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(ids, starts, tail), run(ids, starts, tail), strict=True):
        assert torch.equal(got, expected)


def test_compiled_remainders_are_those_of_integers():
    """Over all of int64, for primes of all sizes, at their multiples and at the ends."""
    kernels = pytest.importorskip("byrote.address.loops")
    primes = np.array([[2, 3, 7, 65_537, 2_147_483_647, 4_294_967_311, 2**61 - 1, 2**63 - 25]])
    generator = np.random.default_rng(0)
    edges = [k * p + d for p in primes[0].tolist() for k in (-3, -1, 0, 1, 2**62 // p) for d in (-1, 0, 1)]
    edges = [x for x in edges if -(2**63) < x < 2**63] + [-(2**63) + 1, 2**63 - 1]
    mixes = np.concatenate([np.array(edges), generator.integers(-(2**63) + 1, 2**63 - 1, 5000)])
    seen = np.stack([mixes, np.zeros_like(mixes)], 1)
    out = np.empty((len(mixes), primes.size), np.int64)
    kernels.hash_windows(seen, np.array([1, 1]), primes, np.zeros(primes.size, np.int64), 0, out)
    assert out.tolist() == [[x % p for p in primes[0].tolist()] for x in mixes.tolist()]
