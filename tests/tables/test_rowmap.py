"""RowMap against a plain dict."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.tables.row_map import RowMap

KEYS = st.one_of(st.integers(0, 30), st.integers(0, 2**63 - 1), st.integers(0, 40).map(lambda k: k << 40))
PUTS = st.lists(st.lists(st.tuples(KEYS, st.integers(0, 2**63 - 1)), max_size=60), max_size=8)


def column(pairs, i: int) -> np.ndarray:
    return np.array([pair[i] for pair in pairs], np.int64)


@settings(max_examples=150, deadline=None)
@given(PUTS, st.lists(KEYS, max_size=40))
def test_it_is_a_dict(puts, asked):
    twin: dict[int, int] = {}
    rows = RowMap()
    for pairs in puts:
        rows.put(column(pairs, 0), column(pairs, 1))
        twin.update(pairs)
        assert len(rows) == len(twin)
    asked = [*asked, *twin]
    assert rows.get(np.array(asked, np.int64)).tolist() == [twin.get(key, -1) for key in asked]
    keys, values = rows.items()
    assert list(zip(keys.tolist(), values.tolist(), strict=True)) == sorted(twin.items())


@pytest.mark.parametrize("step", [1, 64, 1 << 20, (1 << 32) + 1])
def test_many_keys_in_regular_distances(step):
    rows, keys = RowMap(), np.arange(100_000) * step
    for part in np.split(np.random.default_rng(0).permutation(keys), 10):
        rows.put(part, part + 1)
    assert np.array_equal(rows.get(keys), keys + 1)
    assert (rows.get(keys + step * 100_000) == -1).all()


def test_bytes_follow_the_entries():
    rows = RowMap()
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows.put(rng.integers(0, 2**62, 1000), np.zeros(1000, np.int64))
        assert rows.num_bytes <= 32 * len(rows) + 4096
    before = rows.num_bytes
    rows.put(rows.items()[0], rows.items()[0])  # keys that are there take no more room
    assert rows.num_bytes == before


def test_what_it_refuses():
    rows = RowMap()
    for keys, values in (([-1], [0]), ([1], [-1])):
        with pytest.raises(ValueError, match="absent"):
            rows.put(np.array(keys), np.array(values))
    with pytest.raises(ValueError, match="as many"):
        rows.put(np.array([1, 2]), np.array([1]))
    with pytest.raises(ValueError, match="int32"):
        rows.get(np.array([1], np.int32))
    assert len(rows) == 0
