"""`byrote lab run`: recipes x values x seeds -> one table."""

from pathlib import Path
from typing import Annotated

import typer

from byrote.cli.output import terminal


def run(
    recipes: Annotated[list[str], typer.Argument(help="[NAME=]RECIPE[@CONTROL] ...")],
    seeds: Annotated[int, typer.Option(help="Runs of each variant.")] = 3,
    sets: Annotated[list[str] | None, typer.Option("--set", help="section.key=a,b; may be repeated.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs side by side, a thread each.")] = 1,
    name: Annotated[str, typer.Option(help="runs/lab/NAME; from the recipes unless given.")] = "",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the models of finished runs.")] = False,
) -> None:
    """Train recipes x values x seeds; print one table of paired differences.

    \b
    byrote lab run nano --set train.learning_rate=1e-3,3e-3
    Run again, it goes on: what is done is not run again. CONTROL: one-row.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers.utils import logging

    from byrote.lab.studies.plan import plan
    from byrote.lab.studies.report import markdown, rows
    from byrote.lab.studies.runner import Stopped, run_lab

    logging.disable_progress_bar()
    console = terminal()
    variants = plan(recipes, sets or [])
    out = Path("runs/lab") / (name or "+".join(dict.fromkeys(variant.model for variant in variants)))
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(out.name, total=None)
        try:
            results, failures = run_lab(
                variants,
                seeds,
                out,
                jobs,
                keep,
                prepared=lambda what, done, total: None if done else console.print(f"corpus: {what}"),
                finished=lambda cell, result: console.print(
                    f"{cell.name}: validation loss {result['val_loss']:.4f}, {result['seconds']:.0f} s",
                    highlight=False,
                ),
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except Stopped as stop:
            console.print(str(stop))
            raise typer.Exit(130) from None
    typer.echo("\n" + markdown(rows(variants, results), seeds) + "\n")
    console.print(f"{out}: results.jsonl, table.md, and a folder for each run", soft_wrap=True)
    for cell, why in failures.items():
        console.print(f"{cell}: {why}", style="red", soft_wrap=True)
    if failures:
        raise typer.Exit(1)
