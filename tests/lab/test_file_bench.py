"""The benchmark of files: one file for all, equal rows from all, cold is cold, nothing stays. No times are judged."""

import os

import numpy as np
import pytest
import torch

from byrote.lab import bench as table_bench
from byrote.lab.bench import files as file_bench
from byrote.lab.bench.ratios import Options
from byrote.tables import RamTable


def test_candidates_read_the_same_rows(tmp_path):
    path = tmp_path / "shard_000.bin"
    file_bench.write_table(path, 3000)
    ids = file_bench.zipf(3000, np.random.default_rng(0))
    expected = (ids[:, None] + np.arange(40)).astype(np.float32)
    opened = RamTable.open(path, num_rows=3000, width=40, digest="")  # an ordinary table
    assert np.array_equal(opened.read(torch.from_numpy(ids)).numpy(), expected)
    found = file_bench.candidates(path, 3000)
    assert set(found) >= {"byrote", "np.memmap take"} and ("engramdb" in found) == file_bench.engramdb_is_there()
    for opener in found.values():
        rows = opener()(ids)
        rows = np.frombuffer(rows, np.float32) if isinstance(rows, bytes) else np.asarray(rows)
        assert np.array_equal(rows.reshape(-1, 40), expected)


def test_ids_follow_zipf():
    ids = file_bench.zipf(10**6, np.random.default_rng(0))
    assert len(ids) == 65_536 and ids.min() >= 0 and ids.max() < 10**6
    counts = np.sort(np.unique(ids, return_counts=True)[1])[::-1] / len(ids)
    share = np.log(2) / np.log(10**6)  # of the first of a million ranks
    assert counts[0] == pytest.approx(share, rel=0.1)
    assert counts[:10].sum() == pytest.approx(np.log(11) / np.log(10**6), rel=0.1)


def test_too_small_a_disk_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"GB are free, the benchmark writes a file of 16000\.0 GB"):
        file_bench.write_table(tmp_path / "f", 10**11)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_it_runs_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(table_bench, "BENCHMARKS", [])
    monkeypatch.setattr(file_bench, "QUICK_ROWS", 2000)
    monkeypatch.setattr("byrote.lab.bench.decode.bench_decode", lambda options: iter([]))  # has a test of its own
    rows = list(table_bench.run(Options(quick=True, rounds=1, folder=tmp_path)))
    assert (rows[0].what[-4:], rows[0].against) == ("cold", "np.memmap take")
    assert len(rows) == (4 if file_bench.engramdb_is_there() else 2) and not list(tmp_path.iterdir())
    assert all(row.target is None for row in rows)
