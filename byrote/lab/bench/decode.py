"""How fast, and in how much memory, a model decodes with tables in files: part of `byrote table bench --folder`.

The preset `tiny` with random weights, whose greedy text hardly repeats itself, from prompts of 16 random tokens; its
two tables are so long that they take 10 GB.

    warm    all rows of the text are in a cache of a tenth of the tables, against the same tables in RAM
    cold    the first tokens after a start: the cache is empty and the files are dropped from memory
    memory  the peak of a process that opens a table of 20 GB (a hole: all rows are zero) and generates 200 tokens, less
            its pages of files, against the same backbone without a table
"""

from __future__ import annotations

import copy
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.lab.bench.files import drop
from byrote.lab.bench.ratios import Options, Row, compare
from byrote.models.engram import EngramConfig, EngramForCausalLM
from byrote.tables.files.format import FORMAT_VERSION
from byrote.tables.placements.cached import CachedTable
from byrote.tables.placements.file import FileTable

PROMPTS, PROMPT, TOKENS = 4, 16, 200
SIZE, QUICK_SIZE = 10_000_000, 100_000  # rows of a head; 1,024 bytes each over 8 heads and both tables


def tiny(**fields: Any) -> EngramConfig:
    return EngramConfig.from_preset("tiny", bos_token_id=None, eos_token_id=None, **fields)


def bench_decode(options: Options) -> Iterator[Row]:
    assert options.folder is not None
    size = QUICK_SIZE if options.quick else SIZE
    torch.manual_seed(0)
    host = EngramForCausalLM(tiny(memory_table_sizes=[size, size])).eval()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="byrote-bench-") as name:
        folder = Path(name)
        for _, memory in host.model.memories.items():
            memory.table.rows  # noqa: B018  in RAM from here on
        host.model.memories.save_tables(folder)
        total = sum(path.stat().st_size for path in folder.iterdir())
        file = copy.deepcopy(host)
        what = f"{TOKENS} tokens of tiny, tables of {total / 1e9:.1f} GB in files, cache of 10 %: "
        cold, hidden = _cold(host, file, folder, total)
        yield compare(f"{what}cold start, {hidden:.0%} of read time hidden", cold, "file", ["host"], "in RAM", None)
        calls = {"file": lambda number: generate(file, number), "host": lambda number: generate(host, number)}
        for number in range(PROMPTS):
            assert torch.equal(calls["file"](number), calls["host"](number))
        warm = _in_turns(calls, options.rounds)
        yield compare(what + "warm", warm, "file", ["host"], "in RAM", None if options.quick else 0.95)


def generate(model: Any, number: int) -> Tensor:
    prompt = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(number))
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)


def open_tables(model: Any, folder: Path, budget: int) -> None:
    """Anew: nothing is mapped, nothing cached."""
    stack = model.model.memories
    memories = stack.items()
    for layer, memory in memories:
        path = stack.table_path(folder, layer)
        memory.table = FileTable.open(path)  # instead of the one that holds the file's pages
        drop(path)
        memory.table = CachedTable(FileTable.open(path), budget // len(memories))


def _cold(host: Any, file: Any, folder: Path, total: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each prompt, and the share of the read time that was hidden."""
    seconds: dict[str, list[float]] = {"file": [], "host": []}
    read = waited = 0.0
    for number in range(PROMPTS):
        open_tables(file, folder, total // 10)
        for name, model in {"file": file, "host": host}.items():
            began = time.perf_counter()
            generate(model, number)
            seconds[name].append(time.perf_counter() - began)
        for _, memory in file.model.memories.items():
            read, waited = read + memory.lookup.times.read, waited + memory.lookup.times.waited
    return seconds, 1 - waited / read


def _in_turns(calls: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call(turn % PROMPTS)
            seconds[name].append(time.perf_counter() - began)
    return seconds


PROCESS = """
import sys
from pathlib import Path
import torch
from byrote import EngramForCausalLM
torch.set_num_threads(1)
model = EngramForCausalLM.from_pretrained(sys.argv[1], placement="file").eval()
with torch.no_grad():
    model.generate(torch.arange(3, 19)[None], max_new_tokens=int(sys.argv[2]), do_sample=False)
lines = Path("/proc/self/status").read_text().splitlines()
kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
print("peak", 1024 * (kilobytes["VmHWM"] - kilobytes["RssFile"]))
"""


def decode_memory(options: Options) -> dict[str, Any]:
    """Bytes of the peak, with a table of 20 GB and without."""
    assert options.folder is not None
    size = QUICK_SIZE if options.quick else 4 * SIZE
    peaks: dict[str, list[int]] = {"table": [], "backbone": []}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="byrote-bench-") as name:
        configs = {
            "table": tiny(memory_layers=[1], memory_table_sizes=[size, size]),
            "backbone": tiny(memory_layers=[]),
        }
        for kind, config in configs.items():
            torch.manual_seed(0)
            model = EngramForCausalLM(config)
            model.save_pretrained(Path(name) / kind, tables=False)
            for layer, memory in model.model.memories.items() if model.model.memories else ():
                write_hole(model.model.memories.table_path(Path(name) / kind, layer), memory.table)
        for _ in range(1 if options.quick else 3):
            for kind, found in peaks.items():
                command = [sys.executable, "-c", PROCESS, str(Path(name) / kind), str(TOKENS)]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found.append(int(re.findall(r"peak (\d+)", said)[0]))
    table_bytes = 512 * size
    return {"table_bytes": table_bytes, **{f"peak_{kind}": sorted(found) for kind, found in peaks.items()}}


def memory_line(found: dict[str, Any]) -> str:
    table, backbone = (statistics.median(found[f"peak_{kind}"]) / 1e6 for kind in ("table", "backbone"))
    return (
        f"peak of anonymous memory over {TOKENS} tokens of tiny, a table of {found['table_bytes'] / 1e9:.1f} GB in its "
        f"file: {table:.0f} MB; the backbone alone: {backbone:.0f} MB (goal: at most 300 MB more)"
    )


def write_hole(path: Path, table: Any) -> None:
    """A table in fp32 of which every row is zero, and of which no block is on the disk."""
    num_rows, width = table.num_rows, table.width
    about = {"format_version": FORMAT_VERSION, "digest": table.digest, "generation": 0, "num_rows": num_rows}
    content = {
        "__metadata__": {"byrote": json.dumps({**about, "width": width, "codec": "fp32"})},
        "rows": {"dtype": "F32", "shape": [num_rows, width], "data_offsets": [0, 4 * num_rows * width]},
    }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + 4 * num_rows * width)
