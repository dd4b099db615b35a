"""`byrote table info`: what is in a table file, or in the tables of a folder."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console


def info(
    path: Annotated[Path, typer.Argument(help="A table file, a model folder, or a run folder.")],
) -> None:
    """Show rows, width, codec, size, digest and generation, from headers alone.

    Of a released checkpoint: which of its tensors are tables, and in what form.
    """
    console = Console()
    shown = 0
    for name, lines in _tables(path):
        console.print(name, style="bold", highlight=False, soft_wrap=True)
        for line in lines:
            console.print(f"  {line}", highlight=False, soft_wrap=True)
        shown += 1
    if not shown:
        raise ValueError(f"{path} holds no table: no table-*.safetensors, and no tensor *.engram.embed.weight")


def _tables(path: Path) -> Any:
    """(name, lines about it) of every table."""
    from byrote.cli.load import model_folder
    from byrote.tables.files.headers import INDEX, WHOLE, read_header
    from byrote.tables.files.released import released_tables
    from byrote.tables.placements.file import FileTable

    if path.is_file():
        if "byrote" in read_header(path)[1]:
            yield path.name, _about(FileTable.open(path), path)
            return
    elif not (path / INDEX).is_file():
        path = model_folder(path)
    if path.is_dir():
        for file in sorted(path.glob("table-*.safetensors")):
            yield file.name, _about(FileTable.open(file), file)
        for file in sorted(path.glob("table-*.json")):
            pointer = json.loads(file.read_text())
            base = f"a pointer to generation {pointer['generation']} of the log {pointer['log']}"
            yield file.name, [base, "its base and its log lie in the run folder"]
    if path.is_file() or (path / INDEX).is_file() or (path / WHOLE).is_file():
        for values, scales in released_tables(path).items():
            yield values, _about(FileTable.released(path, values, scales), None)


def _about(table: Any, file: Path | None) -> list[str]:
    from byrote.tables.files.checksums import sidecar

    form = table.codec if table.form is None else str(table.form)
    lines = [f"{table.num_rows:,} rows of {table.width:,} values, {form}: {table.stats()['bytes']:,} bytes"]
    if file is None:
        return [*lines, "as released; opened in place by FileTable.released"]
    lines.append(f"generation {table.generation}, digest {table.digest or 'none'}")
    beside = sidecar(file)
    return [
        *lines,
        f"checksums: {beside.name}" if beside.is_file() else "checksums: none (byrote table verify --write)",
    ]
