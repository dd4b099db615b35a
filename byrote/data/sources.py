"""Text of the user's own: files and folders, and Hugging Face datasets.

A .txt or .md file is a document; one longer than `PIECE` characters is cut at empty lines into several,
so that there is something to hold out. A .jsonl file has a document a line, in `text_field`.
"""

import glob
import json
from collections.abc import Iterator
from pathlib import Path

from byrote.data.documents import Document, clean

PIECE = 20_000
TEXT, LINES = (".txt", ".md"), (".jsonl", ".ndjson")


def find_files(patterns: list[str]) -> list[Path]:
    """Files named by paths, folders (searched for .txt, .md, .jsonl) and globs, sorted, without
    repetition.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = [file for file in path.rglob("*") if file.suffix in TEXT + LINES]
        else:
            matches = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
        if not matches:
            raise ValueError(f"no text file matches {pattern!r}; give a file, a folder or a glob of {TEXT + LINES}")
        found.update(matches)
    return sorted(found)


def file_documents(files: list[Path], text_field: str) -> Iterator[Document]:
    for file in files:
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from error
        if file.suffix in LINES:
            yield from _lines(file, text, text_field)
        else:
            for number, piece in enumerate(cut(clean(text))):
                yield Document(f"{file.as_posix()}#{number}", piece)


def _lines(file: Path, text: str, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            record = json.loads(line)
            if text_field not in record:
                raise ValueError(
                    f"{file} line {number} has no field {text_field!r}; it has {sorted(record)}: "
                    "choose with --text-field"
                )
            yield Document(f"{file.as_posix()}#{number}", clean(record[text_field]))


def cut(text: str) -> Iterator[str]:
    """Pieces of at least PIECE characters (but the last), cut at empty lines, or at line ends where there
    are none.
    """
    separator = "\n\n" if "\n\n" in text else "\n"
    piece: list[str] = []
    length = 0
    for part in text.split(separator):
        piece.append(part)
        length += len(part)
        if length >= PIECE:
            yield separator.join(piece)
            piece, length = [], 0
    if piece:
        yield separator.join(piece)


def huggingface_documents(name: str, text_field: str) -> Iterator[Document]:
    """`NAME` or `NAME:CONFIG` of the hub, or a local folder or loader name with a data file
    (`json:FILE`); split train.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("Hugging Face datasets need the package: pip install 'byrote[datasets]'") from error
    path, _, config = name.partition(":")
    if path in ("json", "csv", "parquet", "text") and config:
        rows = datasets.load_dataset(path, data_files=config, split="train")
    else:
        rows = datasets.load_dataset(path, config or None, split="train")
    if text_field not in rows.column_names:
        raise ValueError(f"{name} has no column {text_field!r}; it has {rows.column_names}: choose with --text-field")
    for number, text in enumerate(rows[text_field]):
        yield Document(f"{number}", clean(text))
