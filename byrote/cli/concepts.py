"""`byrote concepts`: the concepts of a text."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def concepts(
    folder: Annotated[Path, typer.Argument(help="A run folder or a model folder.")],
    text: Annotated[str, typer.Argument(help="The text to read.")],
    html: Annotated[Path | None, typer.Option(help="Write a page as well.")] = None,
) -> None:
    """Show where a model with concepts cuts a text, and how sure it is of each boundary."""
    from byrote.cli.load import load
    from byrote.lab.inspect.concepts import record, to_html, to_terminal

    trace = record(*load(folder), text)
    console = Console()
    console.print(to_terminal(trace))
    if html:
        html.write_text(to_html(trace, str(folder)), encoding="utf-8")
        console.print(f"\n{html}")
