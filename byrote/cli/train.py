"""`byrote train`: a recipe, with overrides, in a run folder."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from byrote.cli.output import terminal


def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML file, or a name: nano, tiny-engram, ...")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/RECIPE unless given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run stopped.")] = False,
    checkpoint: Annotated[str, typer.Option(help="Resume behind this one, as step-000200; drop later ones.")] = "",
) -> None:
    """Train a model. Ctrl-C saves and stops; --resume goes on bit for bit.

    \b
    byrote train nano model.hidden_size=96 train.steps=200
    A run that is done goes on with --resume and more train.steps, where its
    schedule leaves the steps that are done as they were: constant, wsd.
    Several processes: torchrun --nproc-per-node=2 -m byrote train RECIPE
    """
    from transformers.utils import logging

    from byrote.train.recipe import Recipe
    from byrote.train.run import rank, start_processes
    from byrote.train.run import train as train_recipe
    from byrote.train.trainer import BUDGET, Interrupted

    if checkpoint and not resume:
        raise ValueError(f"--checkpoint {checkpoint} says where to go on: give --resume too")
    logging.disable_progress_bar()
    start_processes()
    console = terminal()
    run = out or Path("runs") / recipe.stem
    try:
        _, result = train_recipe(Recipe.load(recipe, overrides or []), run, console, resume, checkpoint)
    except Interrupted as stop:
        if rank() == 0:
            here = os.environ.get("LOCAL_WORLD_SIZE", "1")  # torchrun's
            program = ["torchrun", f"--nproc-per-node={here}", "-m", "byrote"] if here != "1" else ["byrote"]
            again = [*program, "train", str(recipe), *(overrides or []), "--out", str(run), "--resume"]
            console.print(f"{stop}\nGo on with: {shlex.join(again)}", soft_wrap=True)
        raise typer.Exit(0 if stop.reason == BUDGET else 130) from None
    if rank() == 0:
        bits = f", {result.score.bits_per_byte:.4f} bits per byte" if result.score.bits_per_byte else ""
        console.print(f"validation loss {result.score.loss:.4f}{bits} after {result.tokens:,} tokens")
        console.print(f"{result.seconds:.1f} s of training; run folder: {run}", soft_wrap=True)
