"""`byrote demo`: the comparison that the README begins with."""

from pathlib import Path
from typing import Annotated

import typer

from byrote.cli.output import terminal


def demo(
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ... of both recipes")] = None,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
) -> None:
    """Train a mixture of experts, and the same model with a memory, on the same tokens; compare them.

    Writes a table, loss curves, a text sample, a gate heat map and report.json. Takes minutes.
    """
    from transformers.utils import logging

    from byrote.lab.studies.demo import run_demo
    from byrote.train.trainer import Interrupted

    logging.disable_progress_bar()
    console = terminal()
    try:
        run_demo(out, overrides or [], console)
    except Interrupted as stop:
        console.print(f"{stop.reason}: the demo stopped; the same command goes on")
        raise typer.Exit(130) from None
