"""Run what a lab plans, `jobs` runs side by side, each in a process of its own; stop and start again at any time.

    OUT/results.jsonl  table.md          of the runs that are done, written anew after each
    OUT/VARIANT/seed-0/                  a run folder (byrote/train/run.py), and
        cell.json                        what the run is: recipe, control, how its corpus was prepared
        done.json                        what it came to; it is there when the run is done
        log.txt                          what its process said

A run that is done is not run again; one that stopped goes on from its checkpoint, bit for bit, from its last evaluation
if that is all that is missing, or from its start if it has no checkpoint. A run whose recipe is not the one it began
with is refused: its results would be of two experiments.

Left out: several machines, one run over several processes, two labs at once in one folder.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from byrote.data.tokenizer import load_tokenizer
from byrote.lab.studies.controls import CONTROLS
from byrote.lab.studies.plan import Cell, Variant, cells, differences
from byrote.lab.studies.report import Results, markdown, rows
from byrote.models.counts import count
from byrote.train.folder import FREE, replace_text
from byrote.train.recipe import Recipe
from byrote.train.run import config_of, make_trainer, prepare_data
from byrote.train.signals import Signals
from byrote.train.trainer import Interrupted

POLL = 0.1  # seconds
STOPPED = 3  # exit status of a run that saved and stopped


class Stopped(Exception):
    """A signal ended the lab; its runs have saved and stopped."""


def run_lab(
    variants: list[Variant],
    seeds: int,
    out: Path,
    jobs: int = 1,
    keep: bool = False,
    prepared: Callable[[str, int, int], None] = lambda what, done, total: None,
    finished: Callable[[Cell, dict[str, Any]], None] = lambda cell, result: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Results, dict[str, str]]:
    """(results, why runs failed). `keep`: checkpoints of runs that are done stay.

    `prepared` hears of the corpora, `finished` of each run that is done, `progress` of training steps done and in all.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; give at least 1")
    planned = cells(variants, seeds, out)
    _begin(planned, prepared)
    results: Results = {}
    failures: dict[str, str] = {}
    waiting, running = list(planned), dict[Path, tuple[Cell, BaseProcess]]()
    # Forked from a server that has imported torch once; a run starts in no time and dies alone.
    known = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    context.set_forkserver_preload([__name__])

    def collect(cell: Cell) -> None:
        result = _result(cell)
        assert result is not None
        results.setdefault(cell.variant.name, {})[cell.seed] = result
        _write(variants, seeds, results, out)
        finished(cell, result)

    with Signals() as signals:
        while waiting or running:
            while waiting and len(running) < jobs and not signals.noted:
                cell = waiting.pop(0)
                if _result(cell) is not None:
                    collect(cell)
                    continue
                process = context.Process(target=_in_process, args=(cell.folder, keep), daemon=True)
                process.start()
                running[cell.folder] = (cell, process)
            if signals.noted:
                for _, process in running.values():
                    process.terminate()  # a run that trains saves first
                for _, process in running.values():
                    process.join()
            for folder, (cell, process) in list(running.items()):
                if not process.is_alive():
                    del running[folder]
                    if process.exitcode == 0:
                        collect(cell)
                    else:
                        failures[cell.name] = _why(cell, process.exitcode)
            if signals.noted:
                raise Stopped(f"{signals.noted}: the runs have saved; the same command goes on")
            progress(sum(map(_steps, planned)), sum(cell.recipe.train.steps for cell in planned))
            if running:
                time.sleep(POLL)
    return results, failures


def run_cell(folder: Path, keep: bool) -> None:
    """Do, or go on with, the run that folder/cell.json describes."""
    cell = json.loads((folder / "cell.json").read_text())
    recipe = Recipe.from_dict(cell["recipe"])
    data, meta = prepare_data(recipe, lambda what, done, total: None)
    trainer = make_trainer(recipe, folder, data, meta, resume=(folder / "recipe.json").exists())
    if cell["control"]:
        CONTROLS[cell["control"]](trainer.model)
    trained = trainer.train()
    counts = count(config_of(recipe, load_tokenizer(data / "tokenizer")), recipe.data.length)
    result = {"val_loss": trained.score.loss, "bits_per_byte": trained.score.bits_per_byte}
    result |= {"seconds": round(trained.seconds, 3), "tokens": trained.tokens}
    result |= {"params_total": counts.total, "params_active": counts.active, "params_table": counts.table}
    replace_text(folder / "done.json", json.dumps(result) + "\n")
    if not keep:
        shutil.rmtree(folder / "checkpoints")


def _in_process(folder: Path, keep: bool) -> None:
    threading.Thread(target=_stop_with_the_lab, daemon=True).start()
    with open(folder / "log.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            run_cell(folder, keep)
        except Interrupted as stop:
            print(stop, file=log)
            sys.exit(STOPPED)
        except Exception as error:
            traceback.print_exc(file=log)
            print(f"{type(error).__name__}: {error}".replace("\n", " "), file=log)
            sys.exit(1)


def _stop_with_the_lab() -> None:
    """If the lab is killed, save and stop: its successor may want to go on with this very run."""
    lab = multiprocessing.parent_process()
    assert lab is not None
    lab.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _begin(planned: list[Cell], report: Callable[[str, int, int], None]) -> None:
    """Prepare every corpus; refuse what would mix two experiments; write what each cell is."""
    prepared: dict[Path, tuple[Any, Any]] = {}
    contents = []
    for cell in planned:
        recipe = cell.recipe
        place = Path(recipe.data.folder or recipe.data.corpus)
        if place not in prepared:
            prepared[place] = (recipe.data.options, prepare_data(recipe, report)[1]["options"])
        options, corpus = prepared[place]
        if options != recipe.data.options:
            raise ValueError(
                f"{cell.variant.name} prepares its corpus as {recipe.data.options}, and another variant prepares the "
                f"same folder as {options}: give each a recipe with a data.folder of its own"
            )
        # Through JSON, as it is compared with what was read.
        content = {"recipe": recipe.to_dict(), "control": cell.variant.control, "corpus": corpus}
        contents.append(json.loads(json.dumps(content)))
    for cell, content in zip(planned, contents, strict=True):
        path = cell.folder / "cell.json"
        before = json.loads(path.read_text()) if path.exists() else content
        for key, old, new in differences(before, content):
            if key.removeprefix("recipe.train.") not in FREE:
                raise ValueError(
                    f"{cell.folder}: {key} was {old!r} when the run began and is {new!r}; results of both would stand "
                    "in one table: choose another --name, or remove the folder"
                )
    for cell, content in zip(planned, contents, strict=True):
        cell.folder.mkdir(parents=True, exist_ok=True)
        replace_text(cell.folder / "cell.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write(variants: list[Variant], seeds: int, results: Results, out: Path) -> None:
    lines = [
        json.dumps({"variant": v.name, "model": v.model, "values": dict(v.values), "seed": seed, **run})
        for v in variants
        for seed, run in sorted(results.get(v.name, {}).items())
    ]
    replace_text(out / "results.jsonl", "".join(line + "\n" for line in lines))
    replace_text(out / "table.md", markdown(rows(variants, results), seeds) + "\n")


def _result(cell: Cell) -> dict[str, Any] | None:
    """What a run came to; None where it is not done. Without bits per byte its loss is of a part of the text only."""
    path = cell.folder / "done.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result is not None and result["bits_per_byte"] is not None else None


def _steps(cell: Cell) -> int:
    """Steps that a run has done, as far as it has logged them."""
    if (cell.folder / "done.json").exists():
        return cell.recipe.train.steps
    try:
        with open(cell.folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 1000))
            return json.loads(file.read().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):  # not there yet, empty, or a line half written
        return 0


def _why(cell: Cell, status: int | None) -> str:
    if status == STOPPED:
        return "stopped; the same command goes on"
    if status is not None and status < 0:
        return f"killed by signal {-status}; the same command goes on"
    log = (cell.folder / "log.txt").read_text().splitlines()
    return f"{log[-1] if log else 'no word'} ({cell.folder / 'log.txt'})"
