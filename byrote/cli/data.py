"""`byrote data`: list the corpora; prepare one, or the user's own text."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from byrote.cli.output import terminal


def data(
    name: Annotated[str, typer.Argument(help="A corpus, hf:DATASET, or files:GLOB.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder; data/NAME unless given.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Of the tokenizer to train.")] = 8192,
    tokenizer: Annotated[str, typer.Option(help="Use this tokenizer instead.")] = "",
    validation: Annotated[float, typer.Option(help="Share of documents held out.")] = 0.09,
    text_field: Annotated[str, typer.Option(help="Of JSON lines and datasets.")] = "text",
    clean: Annotated[bool, typer.Option(help="Prose; code and .md stay as they are.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Delete what the folder holds.")] = False,
) -> None:
    """Prepare a corpus: clean, split, tokenize. Without a name, list the corpora.

    Your own text: byrote data 'files:notes/**/*.txt' (.txt, .md, .jsonl)
    """
    from byrote.data.prepare import Options, default_folder, prepare
    from byrote.train.progress import DataLive

    console = terminal()
    if not name:
        console.print(_listing())
        return
    folder = out or default_folder(name)
    with DataLive(console, name) as live:
        options = Options(name, vocab_size, tokenizer, validation, text_field, clean)
        meta = prepare(options, folder, live.report, force)
    for part in ("train", "validation"):
        counts = meta[part]
        numbers = ", ".join(f"{counts[key]:,} {key}" for key in ("documents", "bytes", "tokens"))
        console.print(f"{part}: {numbers}")
    console.print(f"{folder}: vocabulary {meta['vocab_size']:,}; text: {meta['licence']} ({meta['source']})")


def _listing() -> Table:
    from byrote.data.corpora import CORPORA

    table = Table(box=None, pad_edge=False)
    for column in ("name", "MB", "licence", "what, and from where"):
        table.add_column(column, justify="right" if column == "MB" else "left")
    for name, corpus in CORPORA.items():
        table.add_row(name, f"{corpus.megabytes:g}", corpus.licence, f"{corpus.about}; {corpus.source}")
    return table
