"""Checkpoints: a Hugging Face folder that any tool can load, and beside the weights all that a resumed
run needs.

    RUN/checkpoints/step-000200/    config.json, weights, tables, tokenizer
        row_state/                  state of the tables' update rule; of tables in files only pointers are here
        training.pt                 optimizer, schedule, loader, random states, counters

Written under another name and renamed, so that a folder that is there is whole; the oldest are removed.
"""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from byrote.train import filetables

PREFIX = "step-"
FOLDERS = "checkpoints/*"  # also while one is written


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    return sorted((run / "checkpoints").glob(f"{PREFIX}[0-9]*"))


def latest(run: Path) -> Path:
    found = checkpoints(run)
    if not found:
        raise ValueError(f"{run} holds no checkpoint; train it first (without --resume)")
    return found[-1]


def save_checkpoint(run: Path, step: int, model: Any, tokenizer: Any, training: dict[str, Any], keep: int) -> Path:
    """Rank 0 writes. With sharded tables all ranks call it, to hand their rows over."""
    target = run / "checkpoints" / f"{PREFIX}{step:06d}"
    partial = target.with_name(f".{target.name}.partial")
    if dist.is_initialized() and dist.get_rank() > 0:
        model.save_pretrained(partial)
        model.save_row_state(partial / "row_state")
        return target
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    if hasattr(model, "save_row_state") and not filetables.logged_tables(model):
        (partial / "row_state").mkdir()
        model.save_row_state(partial / "row_state")
    torch.save(training, partial / "training.pt")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    filetables.collect(model, run, FOLDERS)
    return target


def sharded(model: Any) -> bool:
    """Whether the rows of the model's tables are spread over the ranks."""
    stack = getattr(model, "memory_stack", None)
    return stack is not None and stack.sharded


def load_training(checkpoint: Path, model: Any) -> dict[str, Any]:
    """Give the model, which was loaded from this checkpoint, its row state; return the rest."""
    if not (checkpoint / "training.pt").exists():
        raise ValueError(f"{checkpoint} holds a model but no training state; it cannot be resumed, only loaded")
    if hasattr(model, "load_row_state") and not filetables.logged_tables(model):
        model.load_row_state(checkpoint / "row_state")
    return torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)


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
