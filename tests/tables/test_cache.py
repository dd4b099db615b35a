"""A cached table reads what its base reads, under its budget, and keeps the rows that are read most."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.tables import RamTable
from byrote.tables.placements.cache_slots import Places, PlainPlaces, make_places
from byrote.tables.placements.cached import CachedTable, num_bytes

DIGEST = "d" * 64


def zipf(rows, reads, seed=0):
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, rows + 1)
    order = np.random.default_rng(99).permutation(rows)  # the same rows are hot whatever the seed
    return order[generator.choice(rows, reads, p=weights / weights.sum())]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 300), max_size=60), max_size=25), st.integers(8, 40))
def test_compiled_is_plain(batches, size):
    fast, slow = Places(size), PlainPlaces(size)
    for batch in batches:
        rows = np.array(batch, np.int64)
        found, expected = fast.find(rows), slow.find(rows)
        assert np.array_equal(found.places, expected.places) and np.array_equal(found.missed, expected.missed)
        assert (found.unique, found.hits) == (expected.unique, expected.hits)
        assert found.unique == len(set(batch)) and found.hits == (found.places >= 0).sum()
        missed, absent = found.missed, found.places < 0
        assert np.array_equal(rows[absent], missed[-1 - found.places[absent]]) and len(set(missed)) == len(missed)
        assert np.array_equal(fast.admit(missed), slow.admit(missed))
        assert np.array_equal(fast.rows, slow.rows) and np.array_equal(fast.counts, slow.counts)
        places = fast.peek(rows)
        assert np.array_equal(places, slow.peek(rows))
        inside = places >= 0
        assert np.array_equal(fast.rows.ravel()[places[inside]], rows[inside])


def test_counts_saturate_and_age():
    for places in (Places(8), PlainPlaces(8)):
        for _ in range(79):
            places.find(np.array([5]))
        assert places.counts.max() == 79
        places.find(np.array([5]))
        assert places.counts.max() == 40  # halved at 10 reads a place


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_reads_are_the_bases(codec, compiled, monkeypatch):
    for module in ("placements.cache_slots", "records"):
        monkeypatch.setattr(f"byrote.tables.{module}.numba_is_there", lambda: compiled)
    assert type(make_places(8)) is (Places if compiled else PlainPlaces)
    base = RamTable(2000, 6, digest=DIGEST, codec=codec, seed=1)
    table = CachedTable(base, budget=200 * (6 * 4 + 24))
    for seed in range(30):
        rows = torch.from_numpy(zipf(2000, 120, seed)).view(10, 12)
        assert torch.equal(table.read(rows), base.read(rows))
        if seed % 3 == 0:
            changed = torch.unique(rows)[:25]
            table.write(changed, torch.randn(len(changed), 6), {"v": torch.ones(len(changed))})
            assert table.commit() == base.generation == table.generation
    assert table.read(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, 6)
    assert 0.3 < table.stats()["hits"] < 1


def test_the_budget_is_kept():
    base = RamTable(100_000, 16, digest=DIGEST)
    for budget in (10_000, 100_000, 1_000_000):
        table = CachedTable(base, budget)
        for seed in range(5):
            table.read(torch.from_numpy(zipf(100_000, 20_000, seed)))
        assert 0.4 * budget < table.stats()["cache_bytes"] <= budget
    with pytest.raises(ValueError, match="raise its byte budget"):
        CachedTable(base, 100)


def test_statistics_are_exact():
    table = CachedTable(RamTable(1000, 4, digest=DIGEST), budget=100_000)
    table.read(torch.tensor([1, 2, 3, 1]))
    table.read(torch.tensor([[1, 1], [9, 2]]))
    stats = table.stats()
    assert stats["hits"] == 3 / 8 and stats["unique_hits"] == 2 / 6
    assert stats["unique_rows_per_batch"] == 3 and stats["rows_fetched"] == 4 and stats["cache_rows"] == 4
    assert stats["bytes_fetched"] == 4 * 16
    table.clear_stats()
    assert table.stats()["rows_fetched"] == 0


def test_a_scan_does_not_wash_out_the_hot_rows():
    """Rows that are read once pass by; an LRU of this size would hold nothing else."""
    places = Places(256)
    hot = np.arange(64)
    for _ in range(20):
        places.admit(places.find(hot).missed)
    for start in range(1000, 5000, 500):
        scan = np.arange(start, start + 500)
        places.admit(places.find(scan).missed)
    assert (places.peek(hot) >= 0).mean() > 0.95


def test_on_zipf_it_is_near_the_best_static_cache():
    places, hits, reads = Places(1000), 0, 0
    counted = zipf(50_000, 400_000)
    for batch in counted.reshape(-1, 200):
        rows = np.unique(batch)
        found = places.find(rows)
        hits, reads = hits + found.hits, reads + len(rows)
        places.admit(found.missed)
    best = np.sort(np.bincount(np.concatenate([np.unique(b) for b in counted.reshape(-1, 200)])))[::-1][:1000].sum()
    assert hits / reads > 0.85 * best / reads


@pytest.mark.parametrize(
    ("text", "number"), [(4096, 4096), ("4096", 4096), ("64MB", 64_000_000), ("1.5 GiB", 3 << 29), ("7B", 7)]
)
def test_byte_budgets(text, number):
    assert num_bytes(text) == number


@pytest.mark.parametrize("text", ["", "MB", "-3", "64 megs", "1e6", -5])
def test_what_is_no_byte_budget(text):
    with pytest.raises(ValueError, match="with a unit of"):
        num_bytes(text)
