"""What a verb shows and writes: text as the user gave it, in a terminal, a pipe or a file."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

WIDE = 1000  # columns where nobody looks on


def terminal() -> Console:
    """A console on which `[/x]` and `:x:` are no markup. In a pipe no line is broken, unless COLUMNS asks for it."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.soft_wrap = True
        if "COLUMNS" not in os.environ:
            console.width = WIDE
    return console


def progress(console: Console) -> Progress:
    """A bar whose descriptions are no markup; nothing of it in a pipe."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def write(path: Path, text: str) -> None:
    """A file where the user wants it, in a folder that is made if need be; OSError that names it."""
    from byrote.tables.log.disk import naming

    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
