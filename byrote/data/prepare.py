"""Prepare a corpus: documents -> clean and split -> tokenizer -> token arrays, in one folder.

    documents.{train,validation}.jsonl   {"name", "text"} a line
    tokenizer/                           a Hugging Face fast tokenizer
    {train,validation}.tokens.npy        int32, all documents one after another
    {train,validation}.offsets.npy       int64 [documents + 1]: where each begins, and the number of tokens
    meta.json                            source, licence, options, counts

Preparing again is instant unless an option, or one of the user's files, has changed. The documents are
held in memory.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byrote.data.corpora import corpus
from byrote.data.documents import Document, deduplicate, split, write_jsonl
from byrote.data.sources import file_documents, find_files, huggingface_documents

FORMAT_VERSION = 1
CHUNK = 512  # documents tokenized at a time

Report = Callable[[str, int, int], None]  # what is being done, how many done, of how many


@dataclass(frozen=True)
class Options:
    """`name`: a corpus of corpora.py, files:PATTERN (several with commas), or hf:NAME[:CONFIG]."""

    name: str = "factbook"
    vocab_size: int = 8192
    tokenizer: str = ""  # a tokenizer to use instead of training one
    validation: float = 0.09
    text_field: str = "text"

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise ValueError(f"validation is {self.validation}; it is a share of the documents: between 0 and 1")


def default_folder(name: str, root: Path = Path("data")) -> Path:
    return root / "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in name).strip("-.")


def prepare(options: Options, folder: Path, report: Report = lambda what, done, total: None) -> dict[str, Any]:
    """Make `folder` hold the prepared corpus, and return its meta.json."""
    wanted = {"format_version": FORMAT_VERSION, **asdict(options), "files": _fingerprint(options)}
    if (folder / "meta.json").exists():
        meta = json.loads((folder / "meta.json").read_text())
        if meta["options"] == wanted:
            return meta
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no prepared corpus; choose another --out or empty it")
    # Made beside the folder and renamed: an interrupted preparation leaves no half corpus.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    meta = _build(options, partial, folder.parent / ".packages", report)
    meta["options"] = wanted
    (partial / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return meta


def _fingerprint(options: Options) -> list[tuple[str, int, int]] | list[list[Any]]:
    if not options.name.startswith("files:"):
        return []
    files = find_files(options.name.removeprefix("files:").split(","))
    return [[file.as_posix(), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _documents(options: Options, packages: Path) -> tuple[Iterator[Document], str, str]:
    kind, _, rest = options.name.partition(":")
    if kind == "files":
        return file_documents(find_files(rest.split(",")), options.text_field), rest, "your own"
    if kind == "hf":
        return (
            huggingface_documents(rest, options.text_field),
            f"Hugging Face {rest}",
            "see the dataset's card",
        )
    named = corpus(options.name)
    return named.documents(packages), named.source, named.licence


def _build(options: Options, folder: Path, packages: Path, report: Report) -> dict[str, Any]:
    # Imported here: transformers takes a second, and preparing again should take none.
    from byrote.data.tokenizer import load_tokenizer, train_tokenizer

    report("reading", 0, 1)
    source, origin, licence = _documents(options, packages)
    parts = dict(zip(("train", "validation"), split(list(deduplicate(source)), options.validation), strict=True))
    report("tokenizer", 0, 1)
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
    else:
        tokenizer = train_tokenizer((text for _, text in parts["train"]), options.vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    meta: dict[str, Any] = {"source": origin, "licence": licence, "vocab_size": len(tokenizer)}
    for part, documents in parts.items():
        write_jsonl(documents, folder / f"documents.{part}.jsonl")
        meta[part] = _tokenize(part, documents, tokenizer, folder, report)
    return meta


def _tokenize(part: str, documents: list[Document], tokenizer: Any, folder: Path, report: Report) -> dict[str, int]:
    from byrote.data.tokenizer import encode_documents

    arrays: list[np.ndarray] = []
    for at in range(0, len(documents), CHUNK):
        report(f"tokens of {part}", at, len(documents))
        arrays.extend(encode_documents(tokenizer, [text for _, text in documents[at : at + CHUNK]]))
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)
    np.save(folder / f"{part}.tokens.npy", np.concatenate(arrays))
    np.save(folder / f"{part}.offsets.npy", offsets)
    size = sum(len(text.encode()) for _, text in documents)
    return {"documents": len(documents), "bytes": size, "tokens": int(offsets[-1])}
