"""The one place that knows every placement by its word.

    host      in RAM                                               RamTable
    pinned    in RAM whose pages are locked: a GPU reads rows      PinnedTable
    device    on an accelerator                                    DeviceTable
    file      in their files: read in place, or with a log         FileTable, LoggedTable
    sharded   in RAM, spread over the ranks of the process group   ShardedTable

A placement is one entry of `PLACEMENTS`: how it takes tables that are in RAM, and what it needs of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from byrote.tables.placements.cached import CachedTable, num_bytes
from byrote.tables.placements.device import DeviceTable, accelerator
from byrote.tables.placements.file import FileTable
from byrote.tables.placements.logged import POINTER, LoggedTable
from byrote.tables.placements.pinned import PinnedTable, check_gpu
from byrote.tables.placements.ram import RamTable
from byrote.tables.placements.ranks import Ranks
from byrote.tables.placements.sharded import ShardedTable
from byrote.tables.table import Table

Device = torch.device | str | None


@dataclass(frozen=True)
class Placement:
    """`take(tables, device)`: tables in RAM, brought there. `check()`: ValueError where the machine is not for it.

    `in_file`: tables stay in their files.
    """

    take: Callable[[list[RamTable], Device], Sequence[Table]] = lambda tables, device: tables
    check: Callable[[], object] = lambda: None
    in_file: bool = False


def _shard(tables: list[RamTable], device: Device) -> list[Table]:
    ranks = Ranks()
    return [ShardedTable.split(table, ranks) for table in tables]


PLACEMENTS = {
    "host": Placement(),
    "pinned": Placement(lambda tables, device: [PinnedTable.of(table) for table in tables], check_gpu),
    "device": Placement(
        lambda tables, device: [DeviceTable.of(table, device or accelerator()) for table in tables], accelerator
    ),
    "file": Placement(in_file=True),
    "sharded": Placement(_shard),
}


def check_placement(placement: str, cache: int | str | None = None) -> None:
    """ValueError where there is no such placement, this machine is not for it, or it needs no `cache`."""
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(map(repr, PLACEMENTS))}, got {placement!r}")
    PLACEMENTS[placement].check()
    if cache is not None and not PLACEMENTS[placement].in_file:
        raise ValueError(f"cache={cache!r} keeps rows of files in RAM: give it with placement='file'")


def open_table(path: Path, placement: str, *, num_rows: int, width: int, digest: str) -> Table:
    """The table in `path`, or the one that the pointer beside it names: in its file, or in RAM for `move`."""
    pointer, in_file = path.with_suffix(POINTER), PLACEMENTS[placement].in_file
    if pointer.is_file():
        logged = LoggedTable.open(pointer, num_rows=num_rows, width=width, digest=digest)
        return logged if in_file else logged.in_memory()
    opened: type[FileTable] | type[RamTable] = FileTable if in_file else RamTable
    return opened.open(path, num_rows=num_rows, width=width, digest=digest)


def move(tables: Sequence[Table], placement: str, device: Device = None) -> Sequence[Table]:
    """Tables in RAM, with the state of their rows, brought to where the placement keeps them."""
    if PLACEMENTS[placement].in_file:
        return tables
    for table in tables:
        if not isinstance(table, RamTable):
            kind = type(table).__name__
            raise ValueError(f"a {kind} cannot be moved: only tables in RAM (placement='host') can")
    return PLACEMENTS[placement].take(list(tables), device)  # type: ignore[arg-type]


def cached(tables: Sequence[Table], budget: int | str) -> list[Table]:
    """Tables whose rows that are read most are kept in RAM, in `budget` bytes that they share."""
    return [CachedTable(table, num_bytes(budget) // len(tables)) for table in tables]
