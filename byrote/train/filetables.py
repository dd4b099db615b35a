"""Tables that train from files, `placement = "file"`: an immutable base and a log of changed rows in the run folder.

    RUN/tables/table-L.safetensors        the base, written once
               layer-L/                   the log (byrote.tables.log)
    RUN/checkpoints/step-000200/table-L.json   the generation of the log that belongs to this backbone

Row state is in the log beside its row. A generation is kept as long as a checkpoint points to it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from byrote.tables.logged import LoggedTable, open_base
from byrote.tables.rules import RowRule


def logged_tables(model: Any) -> dict[int, LoggedTable]:
    """By layer id, the tables of the model that train from files."""
    stack = getattr(model, "memory_stack", None)
    tables = {} if stack is None else {layer: memory.table for layer, memory in stack.items()}
    return {layer: table for layer, table in tables.items() if isinstance(table, LoggedTable)}


def begin(model: Any, run: Path, rule: RowRule) -> None:
    """Write the model's tables to the run folder, and train them from there."""
    refuse_processes()
    if model.memory_stack is None:
        return
    folder = run / "tables"
    folder.mkdir()
    for layer, memory in model.memory_stack.items():
        path = folder / f"table-{layer}.safetensors"
        memory.table.save(path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        base = open_base(path)
        memory.table = LoggedTable.create(base, folder / f"layer-{layer}", rule.fields(base.width), f"../{path.name}")


def resume(model: Any, checkpoints: Iterable[Path]) -> None:
    """Take the right to write the tables of a model that was loaded from a checkpoint of this run."""
    refuse_processes()
    for table in logged_tables(model).values():
        table.log.lock()
    collect(model, checkpoints)


def save(model: Any, folder: Path) -> None:
    """Make the tables' generation durable, and point to it from a checkpoint, a folder RUN/checkpoints/NAME."""
    for layer, table in logged_tables(model).items():
        table.checkpoint(folder / f"table-{layer}.json", f"../../tables/layer-{layer}")


def collect(model: Any, checkpoints: Iterable[Path]) -> None:
    """Drop the generations that none of the checkpoints points to."""
    checkpoints = list(checkpoints)
    for layer, table in logged_tables(model).items():
        pointers = [folder / f"table-{layer}.json" for folder in checkpoints]
        table.log.collect(json.loads(path.read_text())["generation"] for path in pointers if path.exists())


@contextlib.contextmanager
def released(model: Any) -> Iterator[None]:
    """Give the right to write the tables back at the end."""
    try:
        yield
    finally:
        for table in logged_tables(model).values():
            table.log.unlock()


def refuse_processes() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError('train.placement is "file", which takes one process; use "host" under torchrun')
