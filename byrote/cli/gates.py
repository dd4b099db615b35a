"""`byrote gates`: where in a text the memories of a model open."""

from pathlib import Path
from typing import Annotated

import typer

from byrote.cli.output import terminal, write


def gates(
    folder: Annotated[Path, typer.Argument(help="A run folder or a model folder.")],
    text: Annotated[str, typer.Argument(help="The text to read.")],
    html: Annotated[Path | None, typer.Option(help="Write a page as well.")] = None,
) -> None:
    """Show how far each memory's gate opens at each token of a text."""
    from byrote.cli.load import load
    from byrote.lab.inspect.gates import record, to_html, to_terminal

    trace = record(*load(folder), text)
    console = terminal()
    console.print(to_terminal(trace))
    if html:
        write(html, to_html(trace, str(folder)))
        console.print(f"\n{html}")
