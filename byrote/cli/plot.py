"""`byrote plot`: the loss curves of runs, in one picture."""

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, each with a metrics.jsonl.")],
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("runs/plot.png"),
) -> None:
    """Draw the losses of runs over their training tokens, in one picture.

    \b
    byrote plot runs/demo/moe runs/demo/engram
    """
    from dataclasses import replace

    from byrote.train.metrics import plot_losses, read_metrics
    from byrote.train.recipe import Recipe

    names = [run.resolve().name for run in runs]
    labels = [name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)]
    curves, data = {}, set()
    for label, run in zip(labels, runs, strict=True):
        curves[label] = read_metrics(run / "metrics.jsonl")
        if not curves[label]:
            raise ValueError(f"{run} is no run folder, or has not begun: {run / 'metrics.jsonl'} holds no step")
        data.add(replace(Recipe.load(run / "recipe.json").data, folder=""))
    warning = ", of different data: heights do not compare" if len(data) > 1 else ""
    plot_losses(curves, out, f"{len(runs)} runs{warning}" if len(runs) > 1 else labels[0])
    typer.echo(str(out))
