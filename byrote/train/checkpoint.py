"""Checkpoints: a Hugging Face folder, which transformers opens once byrote is imported, and beside the weights all
that a resumed run needs.

    RUN/checkpoints/step-000200/    config.json, weights, tables, tokenizer
        row_state/                  state of the tables' update rule; of tables in files only pointers are here
        training.pt                 optimizer, schedule, loader, random states, counters

Written under another name and renamed, so that a folder that is there is whole; the oldest are removed.
"""

import random
import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from byrote.tables.log.disk import naming
from byrote.tables.placements.open import POINTER
from byrote.train import file_tables

FOLDERS = "checkpoints/*"  # also while one is written


def name_of(step: int) -> str:
    """The name of a step's checkpoint. Six digits at least: names of a million steps and more are longer, so that the
    order of names is not that of steps.
    """
    return f"step-{step:06d}"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint by its name; None where the name is no checkpoint's."""
    found = re.fullmatch("step-([0-9]{6,})", folder.name)
    return int(found[1]) if found and folder.name == name_of(int(found[1])) else None


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, by step. What else lies beside them, such as a copy of one, is none of them."""
    steps = {step_of(path): path for path in (run / "checkpoints").glob("*") if path.is_dir()}
    return [steps[step] for step in sorted(step for step in steps if step is not None)]


def latest(run: Path) -> Path:
    """The checkpoint of the last step; ValueError where there is none."""
    found = checkpoints(run)
    if not found:
        raise ValueError(f"{run} holds no checkpoint yet: train it with `byrote train`, or go on with --resume")
    return found[-1]


def save_checkpoint(run: Path, step: int, model: Any, tokenizer: Any, training: dict[str, Any], keep: int) -> Path:
    """Rank 0 writes. With sharded tables all ranks call it, to hand their rows over."""
    target = run / "checkpoints" / name_of(step)
    partial = _partial(target)
    if dist.is_initialized() and dist.get_rank() > 0:
        model.save_pretrained(partial)
        model.save_row_state(partial / "row_state")
        return target
    for left in target.parent.glob(_partial(target.with_name("step-*")).name):
        shutil.rmtree(left)
    partial.mkdir(parents=True)
    with naming(target):
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if hasattr(model, "save_row_state") and not _points(partial):
            (partial / "row_state").mkdir()
            model.save_row_state(partial / "row_state")
        with open(partial / "training.pt", "wb") as file:  # torch says of a full disk what nobody understands
            torch.save(training, file)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    found = checkpoints(run)
    for old in found[: found.index(target) + 1][:-keep]:  # whatever lies there, never the one just written
        remove_checkpoint(old)
    file_tables.collect(model, run, FOLDERS)
    return target


def _points(checkpoint: Path) -> bool:
    """Whether its tables are pointers into logs, which hold the row state too."""
    return any(checkpoint.glob(f"table-*{POINTER}"))


def remove_checkpoint(folder: Path) -> None:
    """Under another name first: what a stop half-way leaves is no checkpoint, and the next save clears it."""
    shutil.rmtree(folder.rename(_partial(folder)))


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def sharded(model: Any) -> bool:
    """Whether the rows of the model's tables are spread over the ranks."""
    stack = getattr(model, "memory_stack", None)
    return stack is not None and stack.sharded


def load_training(checkpoint: Path, model: Any) -> dict[str, Any]:
    """Give the model, which was loaded from this checkpoint, its row state; return the rest."""
    if not (checkpoint / "training.pt").exists():
        raise ValueError(f"{checkpoint} holds a model but no training state; it cannot be resumed, only loaded")
    if hasattr(model, "load_row_state") and not _points(checkpoint):
        model.load_row_state(checkpoint / "row_state")
    path = checkpoint / "training.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, UnpicklingError) as error:
        what = str(error).partition("\n")[0] or "it is empty"
        raise ValueError(f"{path} is damaged ({what}); resume from another checkpoint") from error


def corpus_of(checkpoint: Path) -> str:
    """The fingerprint of the corpus that its run reads; "" of a checkpoint without a training state."""
    path = checkpoint / "training.pt"
    if not path.exists():
        return ""
    try:
        return str(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["loader"]["corpus"])
    except (EOFError, KeyError, RuntimeError, UnpicklingError):
        return ""


def random_states() -> dict[str, Any]:
    """The global generators. byrote draws from explicit ones; a user's dropout or callback may not."""
    kind, keys, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
