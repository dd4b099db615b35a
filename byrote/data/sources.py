"""Text of the user's own: files and folders, and Hugging Face datasets.

A .txt file is prose. One longer than `PIECE` characters is cut at empty lines into several documents, so that there is
something to hold out. A .jsonl or .ndjson file has a document a line, in `text_field`; it and a dataset are taken as
prose too. Any other file is code or markup: one document, cut only if it is the only file.

A text is UTF-8, with a mark at its beginning or without. Lines of JSON end at a line feed and nowhere else: U+2028 and
its like may stand in a text.
"""

import codecs
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from byrote.data.documents import Found

PROSE, LINES = (".txt",), (".jsonl", ".ndjson")
SEARCHED = (*PROSE, ".md", *LINES)
LOADERS = ("json", "csv", "parquet", "text")  # of `datasets`, that read a file
WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",  # begins with UTF-16's
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def find_files(patterns: list[str]) -> list[Path]:
    """Files named by paths, folders (searched for .txt, .md, .jsonl, .ndjson) and globs, sorted, without
    repetition.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir() and pattern:
            matches = [file for file in path.rglob("*") if file.suffix in SEARCHED and file.is_file()]
        elif path.is_file():  # whatever brackets and stars are in its name
            matches = [path]
        else:
            matches = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
        if not matches or not pattern:
            raise ValueError(f"no text file matches {pattern!r}; give a file, a folder or a glob of {SEARCHED}")
        found.update(matches)
    return sorted(found)


def file_documents(files: list[Path], text_field: str) -> Iterator[Found]:
    for file in files:
        kind, name = file.suffix.lower(), file.as_posix()
        if kind in LINES:
            yield from _lines(file, kind, text_field)
            continue
        text = _decode(file.read_bytes(), str(file), 0)
        if kind in PROSE or len(files) == 1:
            yield Found(kind or file.name, name, text, kind in PROSE, cut=True)
        else:
            yield Found(kind or file.name, f"{name}#0", text, prose=False)


def _lines(file: Path, kind: str, text_field: str) -> Iterator[Found]:
    at = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file} line {number}"
            text = _decode(line, where, at).strip(" \t\r\n")
            at += len(line)
            if text:
                yield Found(kind, f"{file.as_posix()}#{number}", _field(text, where, text_field))


def _decode(data: bytes, where: str, at: int) -> str:
    """The text of bytes that begin at byte `at` of a file."""
    begin = 0
    if not at:
        for mark, name in WIDE.items():
            if data.startswith(mark):
                raise ValueError(f"{where} is {name} text; convert it to UTF-8 first (iconv -f {name} -t UTF-8)")
        begin = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[begin:].decode("utf-8")
    except UnicodeDecodeError as error:
        byte = at + begin + error.start
        raise ValueError(f"{where} is not UTF-8 text (byte {byte} of the file); convert it first") from None


def _field(line: str, where: str, text_field: str) -> str:
    try:
        record = json.loads(line, strict=False)  # tabs and form feeds stand in strings of many files
    except (ValueError, RecursionError) as error:
        what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{where} is no JSON ({what}); a line holds one object, as {{{text_field!r}: ...}}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no object but {_short(record)}; a line holds one, as {{{text_field!r}: ...}}")
    if text_field not in record:
        raise ValueError(
            f"{where} has no field {text_field!r}; it has {sorted(record)}: choose with --text-field (data.text_field)"
        )
    return _text(record[text_field], where, text_field)


def _text(value: Any, where: str, text_field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {text_field!r} is {_short(value)} and no text; leave that line out, or mend it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):x}"
        raise ValueError(f"{where}: character {error.start} is {half}, half of a pair and no text; mend it") from None
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."


def huggingface_files(name: str) -> list[Path]:
    """The files on this machine that `huggingface_documents` of that name reads; none of a dataset of the hub."""
    path, _, config = name.partition(":")
    if path in LOADERS and config:
        return find_files([config]) if glob.glob(config, recursive=True) or Path(config).exists() else []
    return sorted(file for file in Path(path).rglob("*") if file.is_file()) if path and Path(path).is_dir() else []


def huggingface_documents(name: str, text_field: str) -> Iterator[Found]:
    """`NAME` or `NAME:CONFIG` of the hub, or a local folder or loader name with a data file
    (`json:FILE`); split train.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("Hugging Face datasets need the package: pip install 'byrote[datasets]'") from error
    path, _, config = name.partition(":")
    if not path:
        raise ValueError(f"hf:{name} names no dataset; give hf:NAME, hf:NAME:CONFIG or hf:json:FILE")
    # What `datasets` keeps of files on this machine it knows by their times, which do not tell of every edit.
    anew = "force_redownload" if huggingface_files(name) else None
    try:
        if path in LOADERS and config:
            rows = datasets.load_dataset(path, data_files=config, split="train", download_mode=anew)
        else:
            rows = datasets.load_dataset(path, config or None, split="train", download_mode=anew)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"hf:{name} cannot be loaded: {error.__cause__ or error}") from error
    if text_field not in rows.column_names:
        raise ValueError(f"{name} has no column {text_field!r}; it has {rows.column_names}: choose with --text-field")
    for number, text in enumerate(rows[text_field]):
        yield Found(f"hf:{name}", str(number), _text(text, f"hf:{name} row {number}", text_field))
