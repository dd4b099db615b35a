"""Tables that train from files, `placement = "file"`: an immutable base and a log of changed rows in the run folder.

    RUN/tables/table-L.safetensors        the base, written once
               layer-L/                   the log (byrote.tables.log.log)
    RUN/checkpoints/step-000200/table-L.json   of `byrote train`: the generation that belongs to this backbone
    RUN/checkpoint-200/table-L.json            of the stock Trainer (`callback.py`), with its output_dir as RUN

Row state is in the log beside its row. A generation is kept as long as a checkpoint points to it. `checkpoints` is the
pattern of their folders in the run folder: `save_pretrained` writes pointers into those, whole tables anywhere else.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from byrote.memory.row_step import rule_of
from byrote.memory.stack import nowhere
from byrote.tables.placements.logged import POINTER, LoggedTable, open_base
from byrote.tables.table import Table


def tables(model: Any) -> dict[int, Table]:
    """By layer id; none of a model without memories."""
    stack = getattr(model, "memory_stack", None)
    return {} if stack is None else {layer: memory.table for layer, memory in stack.items()}


def begin(model: Any, run: Path, optimizer: Optimizer, checkpoints: str) -> None:
    """Write the model's tables to the run folder, and train them from there."""
    refuse_processes()
    if model.memory_stack is None:
        return
    rules = {layer: rule_of(optimizer, memory) for layer, memory in model.memory_stack.items()}
    folder = run / "tables"
    if folder.exists():
        raise ValueError(f"{folder} is there already: resume the run, or delete that folder to start another")
    folder.mkdir(parents=True)
    for layer, memory in model.memory_stack.items():
        path = folder / f"table-{layer}.safetensors"
        memory.table.save(path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        base = open_base(path)
        fields = rules[layer].fields(base.width)
        memory.table = LoggedTable.create(base, folder / f"layer-{layer}", fields, f"../{path.name}")
    mark_checkpoints(model, run, checkpoints)


def resume(model: Any, run: Path, checkpoints: str) -> None:
    """Take the right to write the tables of a model that was loaded from a checkpoint of this run."""
    refuse_processes()
    for table in tables(model).values():
        table.lock()
    mark_checkpoints(model, run, checkpoints)
    collect(model, run, checkpoints)


def collect(model: Any, run: Path, checkpoints: str) -> None:
    """Drop the generations that none of the checkpoints points to."""
    for layer, table in tables(model).items():
        pointers = [folder / f"table-{layer}{POINTER}" for folder in run.glob(checkpoints)]
        table.collect(path for path in pointers if path.exists())


def unlock(model: Any) -> None:
    """Give the right to write the tables back."""
    for table in tables(model).values():
        table.unlock()


def end(model: Any) -> None:
    """The training is over: from now on whoever saves the model, wherever, saves its rows and no more."""
    unlock(model)
    if getattr(model, "memory_stack", None) is not None:
        model.memory_stack.is_checkpoint = nowhere


@contextlib.contextmanager
def released(model: Any) -> Iterator[None]:
    """Give the right to write the tables back at the end."""
    try:
        yield
    finally:
        end(model)


def mark_checkpoints(model: Any, run: Path, checkpoints: str) -> None:
    """Tell the model in which folders it is saved as a checkpoint of this run."""
    if getattr(model, "memory_stack", None) is None:
        return
    where = (run / checkpoints).absolute()
    model.memory_stack.is_checkpoint = lambda folder: (
        folder.absolute().parent == where.parent and fnmatch.fnmatch(folder.name, where.name)
    )


def refuse_processes() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError('train.placement is "file", which takes one process; use "host" under torchrun')
