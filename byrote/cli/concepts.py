"""`byrote concepts`: the concepts of a text."""

from pathlib import Path
from typing import Annotated

import typer

from byrote.cli.output import terminal, write


def concepts(
    folder: Annotated[Path, typer.Argument(help="A run folder or a model folder.")],
    text: Annotated[str, typer.Argument(help="The text to read.")],
    html: Annotated[Path | None, typer.Option(help="Write a page as well.")] = None,
) -> None:
    """Show where a model with concepts cuts a text, and how sure it is of each boundary."""
    from byrote.cli.load import load
    from byrote.lab.inspect.concepts import record, to_html, to_terminal

    trace = record(*load(folder), text)
    console = terminal()
    console.print(to_terminal(trace))
    if html:
        write(html, to_html(trace, str(folder)))
        console.print(f"\n{html}")
