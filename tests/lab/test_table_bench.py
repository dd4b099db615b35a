"""The benchmark: its arithmetic, its rivals compute the same, its table and its file. No times are judged."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from byrote.address import engram, hash_rows, windows
from byrote.cli.main import app
from byrote.lab import bench as table_bench
from byrote.lab.bench import gather as gather_bench
from byrote.lab.bench import step as step_bench
from byrote.lab.bench import update as update_bench
from byrote.lab.bench.ratios import Options, Row, at_most, compare, interleaved


def test_candidates_take_turns_and_the_first_round_does_not_count():
    called = []
    seconds = interleaved({name: lambda name=name: called.append(name) for name in "ab"}, 3)
    assert called == ["a", "b"] * 4
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_of_the_best_rival_in_the_same_round():
    seconds = {"own": [1.0, 2.0, 4.0], "x": [3.0, 8.0, 9.0], "y": [5.0, 2.0, 8.0]}
    row = compare("what", seconds, "own", ["x", "y"], "both", 2.0)
    assert row.ratios == (3.0, 1.0, 2.0) and row.ratio == 2.0 and row.met
    assert (row.ours_ms, row.theirs_ms) == (2000.0, 3000.0)
    assert not compare("what", seconds, "own", ["x", "y"], "both", 2.1).met
    assert compare("what", seconds, "own", ["x"], "x", None).met is None


def test_the_demo_recipe_gives_our_rows():
    spec = engram(np.arange(500), table_sizes=[50, 90], heads=3, layer_ids=[1], pad_id=2)
    ids = torch.randint(0, 500, (3, 20), generator=torch.Generator().manual_seed(0))
    seen = windows(ids, torch.zeros_like(ids, dtype=torch.bool), None, 3)
    expected = hash_rows(seen, spec.layers[0], 2).numpy()
    assert (gather_bench.demo_rows(ids.numpy(), spec.layers[0], 2) == expected).all()


def test_the_c_loop(tmp_path):
    loop = gather_bench._c_loop(tmp_path)
    if loop is None:
        pytest.skip("no C compiler")
    records, ids = torch.randint(0, 256, (50, 160), dtype=torch.uint8), torch.randint(0, 50, (70,))
    out = torch.zeros(70, 160, dtype=torch.uint8)
    pointers = [gather_bench.ctypes.c_void_p(array.data_ptr()) for array in (records, ids, out)]
    loop(*pointers[:2], gather_bench.ctypes.c_int64(70), pointers[2])
    assert torch.equal(out, records[ids])


def test_state_of_the_rules():
    adam, adagrad = update_bench.state_bytes(1 << 18, 64)
    assert adam["bytes"] == pytest.approx(8 + 4 / 64, rel=1e-3) and adagrad["bytes"] == pytest.approx(4, rel=1e-3)
    if sys.platform == "linux":
        assert adam["resident"] == pytest.approx(adam["bytes"], rel=0.01)  # whole pages
        assert adagrad["resident"] == pytest.approx(adagrad["bytes"], rel=0.02)


def test_a_cost_is_at_most_so_much():
    row = at_most("what", {"large": [2.0, 3.0, 8.0], "small": [1.0, 2.0, 2.0]}, "large", "small", "small ones", 2.0)
    assert row.ratios == (2.0, 1.5, 4.0) and row.ratio == 2.0 and row.met
    assert not at_most("what", {"large": [2.1], "small": [1.0]}, "large", "small", "small ones", 2.0).met


def test_the_share_of_a_step_is_timed_inside_it():
    step = step_bench.Step(100)
    seconds, share = step()
    assert 0 < share < seconds
    for _, memory in step.model.memory_stack.items():
        assert memory.table.generation == 1 and memory.table.stats()["rows_touched"] > 0


def test_an_interpreter_without_fbgemm_is_refused():
    with pytest.raises(ValueError, match="no FBGEMM there"):
        update_bench._against_fbgemm("", 1000, 1, Path(sys.executable))


def test_the_verb(monkeypatch, tmp_path):
    """A benchmark is a function in a list."""
    rows = [
        Row("first thing", "something", 1.0, 3.0, (2.5, 3.0, 3.5), 2.0),
        Row("second", "else", 1.0, 1.0, (1.0,), 2.0),
    ]
    monkeypatch.setattr(table_bench, "BENCHMARKS", [lambda options, row=row: iter([row]) for row in rows])
    threads = torch.get_num_threads()
    result = CliRunner().invoke(
        app, ["table", "bench", "--quick", "--json", str(tmp_path / "f")], env={"COLUMNS": "100"}
    )
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert any("first thing; against something" in line and "2.50-3.50" in line for line in lines)
    assert [line.split()[-2:] == ["not", "met"] for line in lines if line.startswith(("first", "second"))] == [
        False,
        True,
    ]
    content = json.loads((tmp_path / "f").read_text())
    assert [row["met"] for row in content["rows"]] == [True, False] and content["rows"][0]["ratio"] == 3.0
    assert content["quick"] and torch.get_num_threads() == threads


def test_the_benchmarks_run(monkeypatch):
    """Every candidate once; how long it took is not looked at."""

    def once(candidates, rounds):
        for call in candidates.values():
            call()
        return {name: [1.0] for name in candidates}

    monkeypatch.setattr(gather_bench, "interleaved", once)
    monkeypatch.setattr(update_bench, "interleaved", once)
    benchmarks = (gather_bench.bench_hash, update_bench.bench_update)
    rows = [row for benchmark in benchmarks for row in benchmark(Options(quick=True))]
    assert len(rows) == 4 and all(row.ratios == (1.0,) for row in rows)
