"""`byrote eval`: the validation loss of a checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from byrote.cli.output import terminal, write


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint in it.")],
    checkpoint: Annotated[str, typer.Option(help="As step-000200; the latest unless given.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here too.")] = None,
) -> None:
    """Validation loss and bits per byte of a run's checkpoint, on all of the run's validation text."""
    from transformers.utils import logging

    from byrote.lab.studies.controls import CONTROLS
    from byrote.tables.files.headers import parse_object
    from byrote.train.checkpoint import step_of
    from byrote.train.folder import checkpoint_of
    from byrote.train.recipe import Recipe
    from byrote.train.run import evaluate_checkpoint

    logging.disable_progress_bar()
    console = terminal()
    if step_of(run) is not None and run.parent.name == "checkpoints":
        run, checkpoint = run.parent.parent, checkpoint or run.name
    found = checkpoint_of(run, checkpoint)
    # A run of `byrote lab run` may be of a model with something taken away.
    path = run / "cell.json"
    cell = parse_object(path.read_bytes(), str(path)) if path.exists() else {}
    control: Any = CONTROLS[cell["control"]] if cell.get("control") else lambda model: None
    score = evaluate_checkpoint(Recipe.load(run / "recipe.json"), found, console, device, control)
    console.print(
        f"{found}: validation loss {score.loss:.4f}, {score.bits_per_byte:.4f} bits per byte, {score.tokens:,} tokens",
        soft_wrap=True,
    )
    if json_file:
        write(json_file, json.dumps({"checkpoint": found.name, **asdict(score)}, indent=2) + "\n")
