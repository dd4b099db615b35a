"""How fast rows come out of a file: rows of `byrote table bench --folder`.

One file of 160-byte rows (float32 [R, 40], a table of ours) larger than what is read of it, and 65,536 ids: Zipf's law
with exponent 1 over the rows, which are shuffled as a hash shuffles them. All candidates read that one file.

    cold   the file is dropped from memory (posix_fadvise DONTNEED) before each read; each is opened anew, so that no
           page is mapped, and reads ids that are new to it. The time is that of the read
    warm   the same ids again and again

Rivals: np.memmap take, and Store.fetch of engramdb-python where that is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byrote.lab.bench.ratios import Options, Row, compare, interleaved
from byrote.tables.files.format import FORMAT_VERSION
from byrote.tables.files.headers import read_header
from byrote.tables.placements.file import FileTable

WIDTH, IDS = 40, 1 << 16
RECORD = 4 * WIDTH
ROWS, QUICK_ROWS = 64 * 10**6, 2 * 10**6
STEP = 1 << 18  # rows written at a time
Open = Callable[[], Callable[[np.ndarray], Any]]


def engramdb_is_there() -> bool:
    return importlib.util.find_spec("engramdb") is not None


def bench_files(options: Options) -> Iterator[Row]:
    assert options.folder is not None
    num_rows = QUICK_ROWS if options.quick else ROWS
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="byrote-bench-") as folder:
        path = Path(folder) / "shard_000.bin"  # the name that engramdb looks for
        write_table(path, num_rows)
        openers = candidates(path, num_rows)
        generator = np.random.default_rng(0)
        what = f"65,536 Zipf ids, rows of 160 bytes, file of {num_rows * RECORD / 1e9:.1f} GB: "
        seconds = _cold(path, openers, [zipf(num_rows, generator) for _ in range(3 if options.quick else 7)])
        yield from _rows(what + "cold", seconds, {"np.memmap take": 10.0, "engramdb": 4.0}, options.quick)
        ids = zipf(num_rows, generator)
        calls: dict[str, Callable[[], Any]] = {name: partial(opener(), ids) for name, opener in openers.items()}
        for call in calls.values():
            call()  # the first read brings rows into memory, the second maps pages: neither counts
        for rival, target in {"np.memmap take": 0.8, "engramdb": 5.0}.items():
            if rival in calls:  # two by two, so that each comes after the other, and finds in the caches what that left
                pair = {name: calls[name] for name in ("byrote", rival)}
                seconds = interleaved(pair, options.rounds)
                yield from _rows(what + "warm", seconds, {rival: target}, options.quick)


def _rows(what: str, seconds: dict[str, list[float]], targets: dict[str, float], quick: bool) -> Iterator[Row]:
    """`quick`: without targets, because a small file is soon in memory as a whole, whatever reads ahead."""
    for rival, target in targets.items():
        if rival in seconds:
            yield compare(what, seconds, "byrote", [rival], rival, None if quick else target)


def _cold(path: Path, openers: dict[str, Open], batches: list[np.ndarray]) -> dict[str, list[float]]:
    """Seconds of each candidate for each batch, after a first read of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in openers}
    for number, ids in enumerate([batches[0], *batches]):
        for name, opener in openers.items():
            read = opener()
            drop(path)
            began = time.perf_counter()
            read(ids)
            if number:
                seconds[name].append(time.perf_counter() - began)
            del read  # and with it the mapping: mapped pages are not dropped
    return seconds


def drop(path: Path) -> None:
    """Take the file out of memory."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def zipf(num_rows: int, generator: np.random.Generator) -> np.ndarray:
    """Row ids int64 [IDS]: rank r is drawn about as 1 / r; a rank's row is anywhere."""
    ranks = np.minimum((num_rows ** generator.random(IDS)).astype(np.int64), num_rows - 1)
    return ranks * 2_654_435_761 % num_rows


def write_table(path: Path, num_rows: int) -> None:
    """A table in fp32 whose row r holds r, r + 1, ...; its header is as long as a row, so that rows lie at whole ones
    for readers that know no header.
    """
    free, wanted = shutil.disk_usage(path.parent).free, num_rows * RECORD
    if free < 1.1 * wanted:
        raise ValueError(
            f"{path.parent}: {free / 1e9:.1f} GB are free, the benchmark writes a file of {wanted / 1e9:.1f} GB: "
            "give another --folder, or --quick"
        )
    about = {"format_version": FORMAT_VERSION, "digest": "", "generation": 0, "num_rows": num_rows, "width": WIDTH}
    content = {
        "__metadata__": {"byrote": json.dumps({**about, "codec": "fp32"})},
        "rows": {"dtype": "F32", "shape": [num_rows, WIDTH], "data_offsets": [0, wanted]},
    }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % RECORD)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        columns = torch.arange(float(WIDTH))
        for begin in range(0, num_rows, STEP):
            rows = torch.arange(begin, min(begin + STEP, num_rows), dtype=torch.float32)[:, None]
            file.write((rows + columns).numpy().data)


def candidates(path: Path, num_rows: int) -> dict[str, Open]:
    """By name, how to open the file; what is opened takes ids int64 [N] and gives their rows."""
    start = read_header(path)[0]["rows"].start

    def ours() -> Callable[[np.ndarray], Any]:
        table = FileTable.open(path)
        return lambda ids: table.read(torch.from_numpy(ids))

    def memmap() -> Callable[[np.ndarray], Any]:
        mapped = np.memmap(path, np.float32, "r", start, (num_rows, WIDTH))
        return lambda ids: np.take(mapped, ids, axis=0)

    def engramdb() -> Callable[[np.ndarray], Any]:
        from engramdb import Store

        header = start // RECORD
        store = Store(str(path.parent), shards=1, rows_per_shard=num_rows + header, width=RECORD)
        return lambda ids: store.fetch(ids + header)

    openers: dict[str, Open] = {"byrote": ours, "np.memmap take": memmap}
    return openers | {"engramdb": engramdb} if engramdb_is_there() else openers
