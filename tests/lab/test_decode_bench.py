"""The benchmark of decoding: both models give the same text, cold is cold, a hole is a table. No times are judged."""

import os

import pytest
import torch

from byrote.lab.bench import Options
from byrote.lab.bench import decode as decode_bench
from byrote.tables import RamTable
from byrote.tables.placements.file import FileTable


@pytest.fixture
def small(monkeypatch):
    for name, value in {"QUICK_SIZE": 300, "TOKENS": 3, "PROMPTS": 2}.items():
        monkeypatch.setattr(decode_bench, name, value)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_it_runs_and_leaves_nothing(small, monkeypatch, tmp_path):
    generated = {}
    plain = decode_bench.generate

    def noted(model, number):
        text = plain(model, number)
        tables = {type(memory.table).__name__ for _, memory in model.model.memories.items()}
        generated.setdefault(number, []).append((tables, text))
        return text

    monkeypatch.setattr(decode_bench, "generate", noted)
    cold, warm = decode_bench.bench_decode(Options(quick=True, rounds=2, folder=tmp_path))
    assert "cold start" in cold.what and warm.what.endswith("warm") and len(cold.ratios) == len(warm.ratios) == 2
    assert cold.target is None and warm.target is None and not list(tmp_path.iterdir())
    for texts in generated.values():
        assert {str(tables) for tables, _ in texts} == {"{'CachedTable'}", "{'RamTable'}"}
        assert all(torch.equal(text, texts[0][1]) for _, text in texts)


def test_files_are_opened_anew(small, tmp_path):
    torch.manual_seed(0)
    model = decode_bench.EngramForCausalLM(decode_bench.tiny(memory_table_sizes=[300, 300]))
    model.model.memories.save_tables(tmp_path)
    seen = []
    for _ in range(2):
        decode_bench.open_tables(model, tmp_path, 100_000)
        tables = [memory.table for _, memory in model.model.memories.items()]
        assert all(isinstance(table.base, FileTable) and table.stats()["cache_rows"] == 0 for table in tables)
        assert sum(table.stats()["cache_bytes"] for table in tables) <= 100_000
        tables[0].read(torch.arange(20))
        seen += tables
    assert len(set(map(id, seen))) == 4


def test_a_hole_is_a_table_of_zeros(tmp_path):
    table = RamTable(10**7, 16, digest="d")
    decode_bench.write_hole(tmp_path / "t", table)
    opened = FileTable.open(tmp_path / "t", num_rows=10**7, width=16, digest="d")
    assert not opened.read(torch.tensor([0, 5, 10**7 - 1])).any()
    assert (tmp_path / "t").stat().st_blocks < 1000


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
@pytest.mark.slow
def test_memory_is_that_of_two_processes(small, tmp_path):
    found = decode_bench.decode_memory(Options(quick=True, folder=tmp_path))
    assert found["table_bytes"] == 512 * 300 and not list(tmp_path.iterdir())
    assert all(len(found[f"peak_{kind}"]) == 1 and found[f"peak_{kind}"][0] > 50e6 for kind in ("table", "backbone"))
    line = decode_bench.memory_line({"table_bytes": 20e9, "peak_table": [3e8, 1e8, 2e8], "peak_backbone": [1e8]})
    assert "20.0 GB" in line and "200 MB" in line and "100 MB" in line
