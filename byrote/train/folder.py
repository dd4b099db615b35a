"""The run folder: who writes to it, what begins there and what goes on.

    RUN/lock  recipe.json  tokenizer/  checkpoints/  tables/  metrics.jsonl  loss.png  sample.txt  result.json

One process writes to a run. It holds a lock that the system takes back when the process ends, however it ends.
"""

import contextlib
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from byrote.models.families import PRESETS
from byrote.train.checkpoint import checkpoints, latest, remove_checkpoint, step_of
from byrote.train.recipe import Recipe
from byrote.train.schedule import same_until

# What may differ between a run and its resumption: nothing that the weights depend on. `steps` may where the steps
# that are done would have been the same.
FREE = {"checkpoint_every", "keep", "log_every", "max_seconds", "read_ahead", "prompt", "sample_tokens"}


def replace_text(path: Path, text: str) -> None:
    """Written beside the file and renamed: whoever reads it, or kills this, meets the old text or the new one."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, "utf-8")
    aside.replace(path)


@contextlib.contextmanager
def locked(run: Path, begins: bool) -> Iterator[None]:
    """Be the one that writes to the run; ValueError where another process does, or another trainer of this one."""
    if begins:
        run.mkdir(parents=True, exist_ok=True)
    else:
        _check_begun(run)
    path = run / "lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(
                f"{run} is in the hands of {owner}: wait for its end, or stop it and --resume, or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise ValueError(f"{run} was given back by another process this very moment: try again")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_new(run: Path) -> None:
    if (run / "recipe.json").exists():
        raise ValueError(f"{run} holds a run already; go on with --resume, or choose another --out")


def begin(recipe: Recipe, run: Path, tokenizer: Any) -> None:
    """Begin a run; if one lies there, it has no checkpoint, and with it nothing that could be gone on with."""
    if (run / "recipe.json").exists():  # or they are not ours
        shutil.rmtree(run / "tables", ignore_errors=True)
    tokenizer.save_pretrained(run / "tokenizer")
    replace_text(run / "recipe.json", recipe.to_json())


def checkpoint_of(run: Path, name: str = "") -> Path:
    """The checkpoint of a run that has this name; the latest unless one is named."""
    if not name:
        return latest(run)
    found = {path.name: path for path in checkpoints(run)}
    if name not in found:
        raise ValueError(f"{run} holds no checkpoint {name!r}; it holds {', '.join(found) or 'none'}")
    return found[name]


def check_resumable(recipe: Recipe, run: Path, name: str = "") -> Path | None:
    """The checkpoint from which `recipe` goes on in `run`; None where there is none yet. ValueError where it cannot."""
    _check_begun(run)
    checkpoint = checkpoint_of(run, name) if name or checkpoints(run) else None
    step = None if checkpoint is None else step_of(checkpoint)
    check_same(recipe, run, 0 if step is None else step + 1)
    if step is None:
        return None
    if step > recipe.train.steps:
        raise ValueError(
            f"{checkpoint} lies beyond train.steps={recipe.train.steps}: give more, or name an earlier one"
        )
    if step == recipe.train.steps and (run / "result.json").exists():
        raise ValueError(f"the run is done: {checkpoint} is its last step; to go on, give train.steps above {step}")
    return checkpoint


def go_on(recipe: Recipe, run: Path, checkpoint: Path) -> None:
    """From here on the run is that of `recipe` behind `checkpoint`: what was later, and its result, are removed."""
    found = checkpoints(run)
    for later in found[found.index(checkpoint) + 1 :]:
        remove_checkpoint(later)
    (run / "result.json").unlink(missing_ok=True)
    replace_text(run / "recipe.json", recipe.to_json())


def _check_begun(run: Path) -> None:
    if not (run / "recipe.json").exists():
        raise ValueError(f"{run} holds no run to resume; start one without --resume")


def check_same(after: Recipe, run: Path, rates: int | None = None) -> None:
    """ValueError where `after` is not the run's recipe. Given the first `rates` rates, which are settled, the number of
    steps may be another if it leaves them as they are.
    """
    before = Recipe.load(run / "recipe.json")
    old, new = before.to_dict(), after.to_dict()
    for section in old:
        for key in old[section].keys() | new[section].keys():
            was, now = old[section].get(key), new[section].get(key)
            if was == now or (section == "train" and key in FREE):
                continue
            if (section, key) == ("train", "steps") and rates is not None:
                shape = PRESETS[after.model.preset] | after.model.overrides
                predicts = bool(shape.get("num_nextn_predict_layers"))
                if same_until(rates, before.train, after.train, predicts):
                    continue
                raise ValueError(
                    f"train.steps was {was!r} and is {now!r}: by its schedule the rates of the {rates - 1} steps that "
                    "are done would have been others. A constant schedule can go on, or wsd from a checkpoint before "
                    "its decay (--checkpoint); or begin another run"
                )
            began = f"{section}.{key} was {was!r} when the run began and is {now!r}"
            raise ValueError(f"{began}; resume with the same, or choose another --out")
