"""Hit rates of a cache on text whose reads are known."""

import json

import numpy as np
import pytest

from byrote.address import engram
from byrote.address.hashing import hash_windows, windows
from byrote.data.packing import Tokens
from byrote.lab.studies.cache_curves import cache_curves, save_curves
from byrote.tables.placements.cache_slots import Places

VOCABULARY = np.arange(50)
SPEC = engram(VOCABULARY, table_sizes=[5000, 7000], heads=2, layer_ids=[1], pad_id=0, seed=0)


def text(count=4000, documents=7):
    generator = np.random.default_rng(0)
    weights = 1 / np.arange(1, 51)
    tokens = generator.choice(50, count, p=weights / weights.sum())
    return Tokens(tokens.astype(np.int32), np.linspace(0, count, documents + 1).astype(np.int64))


def test_against_a_cache_run_by_hand():
    tokens = text()
    starts = np.zeros((1, 4000), bool)
    starts[0, tokens.offsets[:-1]] = True
    whole = hash_windows(windows(tokens.tokens.astype(np.int64)[None], starts, None, 3), SPEC.layers[0], 0)[0]
    for curve in cache_curves(SPEC, SPEC.layers[0], VOCABULARY, tokens, batch=20):
        columns = whole[:, 2 * (curve.order - 2) : 2 * (curve.order - 1)].reshape(200, 40)
        assert curve.distinct == len(np.unique(columns))
        for size, hits in zip(curve.sizes, curve.hits, strict=True):
            places, found, reads = Places(size), 0, 0
            for number, part in enumerate(columns):
                rows = np.unique(part)
                inside = places.find(rows).places >= 0
                places.admit(rows[~inside])
                if number >= 100:
                    found, reads = found + inside.sum(), reads + len(rows)
            assert hits == found / reads and curve.reads == reads
        assert curve.hits == sorted(curve.hits) and curve.best == sorted(curve.best)
        assert curve.best[-1] == 1.0


def test_longer_grams_hit_less():
    two, three = cache_curves(SPEC, SPEC.layers[0], VOCABULARY, text())
    assert two.hits[-1] > three.hits[-1] > 0


def test_saved(tmp_path):
    save_curves(cache_curves(SPEC, SPEC.layers[0], VOCABULARY, text()), tmp_path / "new", "a title")
    assert [curve["order"] for curve in json.loads((tmp_path / "new" / "hit_rates.json").read_text())] == [2, 3]
    assert (tmp_path / "new" / "hit_rates.png").stat().st_size > 10_000


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="less than two batches"):
        cache_curves(SPEC, SPEC.layers[0], VOCABULARY, text(50, 1), batch=30)
