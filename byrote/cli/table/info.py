"""`byrote table info`: what is in a table file, or in the tables of a folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from byrote.cli.output import terminal

OURS = "table-*.safetensors"


def info(
    path: Annotated[Path, typer.Argument(help="A table file, a model folder, or a run folder.")],
) -> None:
    """Show rows, width, codec, size, digest and generation, from headers alone.

    Of a released checkpoint: which of its tensors are tables, and in what form.
    """
    console = terminal()
    for name, lines in tables_of(path):
        console.print(name, style="bold", soft_wrap=True)
        for line in lines:
            console.print(f"  {line}", soft_wrap=True)


def tables_of(path: Path) -> list[tuple[str, list[str]]]:
    """(name, lines about it) of every table; ValueError where one is damaged, or there is none."""
    found = list(_tables(path))
    if not found:
        raise ValueError(f"{path} holds no table: no table-*.safetensors, and no tensor *.engram.embed.weight")
    return found


def _tables(path: Path) -> Iterator[tuple[str, list[str]]]:
    from byrote.cli.load import model_folder
    from byrote.tables.files.headers import INDEX, WHOLE, read_header
    from byrote.tables.files.released import released_tables
    from byrote.tables.placements.file import FileTable
    from byrote.tables.placements.logged import read_pointer

    if path.is_file():
        if "byrote" in read_header(path)[1] or path.match(OURS):
            yield path.name, _about(FileTable.open(path), path)
            return
    elif not (path / INDEX).is_file():
        path = model_folder(path)
    if path.is_dir():
        for file in sorted(path.glob(OURS)):
            yield file.name, _about(FileTable.open(file), file)
        for file in sorted(path.glob("table-*.json")):
            pointer = read_pointer(file)
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
