"""Lookup, backward and update of 32,768 random rows: rows of `byrote table bench`.

    LazyAdam      against nn.Embedding(sparse=True) and SparseAdam; against nn.Embedding and fused AdamW
    RowAdagrad    against FBGEMM's fused row-wise Adagrad, in a process of its own (`fbgemm_child.py`)

Each round takes other rows, the same for all. In turns; one thread. And `state_bytes`: what a rule's state takes.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.lab.bench import fbgemm_child
from byrote.lab.bench.ratios import Options, Row, compare, interleaved
from byrote.memory import Memory
from byrote.memory.lookup import gather
from byrote.tables import LazyAdam, RamTable, RowAdagrad, RowRule

COUNT, WIDTH, RATE = 32_768, 64, 1e-3
ALIKE = 1e-4  # between our rows and FBGEMM's


def bench_update(options: Options) -> Iterator[Row]:
    num_rows = (400 if options.quick else 4000) * 1000
    what = f"lookup, backward, update of 32,768 rows, table of {num_rows / 1e6:g} M x {WIDTH}: "
    yield from _against_torch(what, num_rows, options.rounds)
    if options.fbgemm is not None:
        yield _against_fbgemm(what, num_rows, options.rounds, options.fbgemm)


def _against_torch(what: str, num_rows: int, rounds: int) -> Iterator[Row]:
    for rival in ("sparse", "dense"):
        steps: dict[str, Callable[[], None]] = {
            "adam": _TableStep(num_rows, LazyAdam()),
            "adagrad": _TableStep(num_rows, RowAdagrad()),
            rival: _embedding_step(num_rows, sparse=rival == "sparse"),
        }
        seconds = interleaved(steps, rounds)
        if rival == "sparse":
            against = "nn.Embedding(sparse=True) and SparseAdam"
            yield compare(what + "LazyAdam", seconds, "adam", [rival], against, 5.0)
            yield compare(what + "RowAdagrad", seconds, "adagrad", [rival], against, None)
        else:
            yield compare(what + "LazyAdam", seconds, "adam", [rival], "nn.Embedding and fused AdamW", None)


def _against_fbgemm(what: str, num_rows: int, rounds: int, python: Path) -> Row:
    ours = _TableStep(num_rows, RowAdagrad())
    before = ours.memory.table.read(torch.arange(100))
    with subprocess.Popen(
        [str(python), str(fbgemm_child.__file__), str(num_rows), str(WIDTH), str(COUNT), str(RATE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:

        def ask(line: str) -> Any:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(line + "\n")
            child.stdin.flush()
            return json.loads(child.stdout.readline())

        assert child.stdout is not None
        while (said := child.stdout.readline()) and said != "ready\n":
            pass
        if not said:
            raise ValueError(
                f"--fbgemm {python}: no FBGEMM there; in an environment of its own, "
                "pip install torch==2.13.0 numpy fbgemm-gpu-cpu==1.8.0"
            )
        seconds: dict[str, list[float]] = {"adagrad": [], "fbgemm": []}
        for number in range(rounds + 1):
            began = time.perf_counter()
            ours()
            taken, theirs = time.perf_counter() - began, ask("step")
            if number:
                seconds["adagrad"].append(taken)
                seconds["fbgemm"].append(theirs)
        moved = ours.memory.table.read(torch.arange(100)) - before
        far = (moved - torch.tensor([ask(f"row {row}") for row in range(100)])).abs().max()
        assert far < ALIKE, f"the rows of the two differ by {far}"
        child.stdin.close()  # type: ignore[union-attr]
    return compare(what + "RowAdagrad", seconds, "adagrad", ["fbgemm"], "FBGEMM's fused row-wise Adagrad", 1.0)


class _TableStep:
    def __init__(self, num_rows: int, rule: RowRule) -> None:
        self.memory, self.rule = Memory(RamTable(num_rows, WIDTH, digest="")), rule
        self.generator = torch.Generator().manual_seed(0)
        self.weight = _weight()

    def __call__(self) -> None:
        ids = _ids(self.memory.table.num_rows, self.generator)
        gather(self.memory.anchor, ids, self.memory.lookup.handle).backward(self.weight)
        taken = self.memory.lookup.pending.take()
        assert taken is not None
        self.memory.table.update(self.rule, *taken, RATE)


def _embedding_step(num_rows: int, sparse: bool) -> Callable[[], None]:
    embedding = torch.nn.Embedding(num_rows, WIDTH, sparse=sparse)
    generator, weight = torch.Generator().manual_seed(0), _weight()
    optimizer: torch.optim.Optimizer = (
        torch.optim.SparseAdam(embedding.parameters(), lr=RATE)
        if sparse
        else torch.optim.AdamW(embedding.parameters(), lr=RATE, fused=True)
    )

    def step() -> None:
        embedding(_ids(num_rows, generator)).backward(weight)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ids(num_rows: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, num_rows, (COUNT,), generator=generator)


def _weight() -> Tensor:
    return torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(1))


def state_bytes(num_rows: int = 1 << 20, width: int = 16) -> list[dict[str, Any]]:
    """Bytes of optimizer state after every row was touched, less the directory of 4 bytes a row: as the table's `stats`
    count them, and the pages that the system has mapped for them (Linux).
    """
    sizes = []
    for name, rule, unit, target in (
        ("LazyAdam", LazyAdam(), width, "8 bytes a touched parameter, and 4 a touched row for its clock"),
        ("RowAdagrad", RowAdagrad(), 1, "4 bytes a touched row"),
    ):
        table = RamTable(num_rows, width, digest="")
        for rows in torch.arange(num_rows).split(1 << 16):
            table.update(rule, rows, torch.ones(len(rows), width), RATE)
        counted = table.stats()["state_bytes"] - 4 * num_rows
        mapped = sum(map(_mapped, table._state.arrays.values())) if sys.platform == "linux" else float("nan")
        about = {"rule": name, "width": width, "of each": "parameter" if unit > 1 else "row", "target": target}
        sizes.append({**about, "bytes": counted / (num_rows * unit), "resident": mapped / (num_rows * unit)})
    return sizes


def _mapped(array: Tensor) -> int:
    """Bytes of the pages of an array that are in memory."""
    first = array.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = array.data_ptr() + array.nbytes - first
    marks = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(length), marks):
        raise OSError("mincore failed")
    return mmap.PAGESIZE * sum(mark & 1 for mark in marks)
