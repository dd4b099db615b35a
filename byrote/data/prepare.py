"""Prepare a corpus: documents -> clean and split -> tokenizer -> token arrays, in one folder.

    documents.{train,validation}.jsonl   {"name", "text"} a line
    tokenizer/                           a Hugging Face fast tokenizer
    {train,validation}.tokens.npy        int32, all documents one after another
    {train,validation}.offsets.npy       int64 [documents + 1]: where each begins, and the number of tokens
    meta.json                            source, licence, options, counts, what cleaning did, fingerprint

Preparing again is quick unless an option, or a byte of the user's files or tokenizer, has changed. The fingerprint is
of tokens and tokenizer: a checkpoint keeps it, so that a run goes on with the text that it began with. The documents
are held in memory.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from byrote.data.corpora import corpus
from byrote.data.documents import Cleaning, Document, Found, cleaned, split, write_jsonl
from byrote.data.sources import file_documents, find_files, huggingface_documents, huggingface_files
from byrote.tables.log.disk import naming

FORMAT, FORMAT_VERSION = "byrote-corpus", 2
CHUNK = 512  # documents tokenized at a time
PARTS = ("train", "validation")
ARRAYS = [f"{part}.{kind}.npy" for part in PARTS for kind in ("tokens", "offsets")]
CONTENT = {"meta.json", "tokenizer", *ARRAYS, *(f"documents.{part}.jsonl" for part in PARTS)}

Report = Callable[[str, int, int], None]  # what is being done, how many done, of how many; or a word, of 0


@dataclass(frozen=True)
class Options:
    """`name`: a corpus of corpora.py, files:PATTERN (several with commas), or hf:NAME[:CONFIG]."""

    name: str = "factbook"
    vocab_size: int = 8192
    tokenizer: str = ""  # a tokenizer to use instead of training one
    validation: float = 0.09
    text_field: str = "text"
    clean: bool = True  # prose; code and markup are left as they are in any case

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise ValueError(f"validation is {self.validation}; it is a share of the documents: between 0 and 1")


def default_folder(name: str, root: Path = Path("data")) -> Path:
    return root / "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in name).strip("-.")


def prepare(
    options: Options, folder: Path, report: Report = lambda what, done, total: None, force: bool = False
) -> dict[str, Any]:
    """Make `folder` hold the prepared corpus, and return its meta.json.

    A corpus of other options or texts is replaced; anything else in the folder only with `force`.
    """
    wanted = {"format_version": FORMAT_VERSION, **asdict(options), "files": _digests(_files(options))}
    meta, found = _read_meta(folder), _names(folder)
    if meta.get("format") == FORMAT and meta.get("options") == wanted and found >= CONTENT:
        return meta
    _check_replaceable(folder, meta, found, force)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made beside the folder and renamed: an interrupted preparation leaves no half corpus.
    with naming(folder), tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        partial = Path(aside, "corpus")
        partial.mkdir()
        meta = {"format": FORMAT, **_build(options, partial, folder.parent / ".packages", report), "options": wanted}
        (partial / "meta.json").write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return meta


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _names(folder: Path) -> set[str]:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a corpus is a folder: choose another --out (data.folder)")
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _check_replaceable(folder: Path, meta: dict[str, Any], found: set[str], force: bool) -> None:
    """Refuse to delete what was not surely made by `prepare`."""
    if Path.cwd().is_relative_to(folder.resolve()) and found:
        raise ValueError(f"{folder} holds the folder that you are in, and would be deleted; choose another --out")
    ours = found == CONTENT or (meta.get("format") == FORMAT and found < CONTENT)
    if found and not ours and not force:
        raise ValueError(
            f"{folder} is not empty and holds no prepared corpus, or more than one ({', '.join(sorted(found)[:5])}); "
            "choose another --out (data.folder), or delete all that is in it with `byrote data NAME --out ... --force`"
        )


def _files(options: Options) -> list[Path]:
    """All files of the user's that the corpus is made from."""
    kind, _, rest = options.name.partition(":")
    files = find_files(rest.split(",")) if kind == "files" else huggingface_files(rest) if kind == "hf" else []
    if options.tokenizer and Path(options.tokenizer).is_dir():
        files += sorted(file for file in Path(options.tokenizer).rglob("*") if file.is_file())
    return files


def _digests(files: Iterable[Path]) -> dict[str, str]:
    digests = {}
    for path in files:
        with open(path, "rb") as file:
            digests[path.as_posix()] = hashlib.file_digest(file, _hash).hexdigest()
    return digests


def _hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def _documents(options: Options, packages: Path) -> tuple[Iterator[Found], str, str]:
    """(texts, where from, licence)"""
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
    texts = (Found(options.name, name, text) for name, text in named.documents(packages))
    return texts, named.source, named.licence


def _build(options: Options, folder: Path, packages: Path, report: Report) -> dict[str, Any]:
    # Imported here: transformers takes a second, and preparing again should take none.
    from byrote.data.tokenizer import load_tokenizer, train_tokenizer

    report("reading", 0, 1)
    source, origin, licence = _documents(options, packages)
    counts: dict[str, Cleaning] = {}
    documents = list(cleaned(source, counts, options.clean))
    for kind, done in counts.items():
        report(f"cleaning {'' if options.clean else 'off '}{kind}: {done}", 0, 0)
    parts = dict(zip(PARTS, split(documents, options.validation), strict=True))
    report("tokenizer", 0, 1)
    if options.tokenizer:
        tokenizer = load_tokenizer(options.tokenizer)
    else:
        tokenizer = train_tokenizer((text for _, text in parts["train"]), options.vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    meta: dict[str, Any] = {"source": origin, "licence": licence, "vocab_size": len(tokenizer)}
    meta["cleaning"] = {kind: done.to_dict() for kind, done in counts.items()}
    for part, documents in parts.items():
        write_jsonl(documents, folder / f"documents.{part}.jsonl")
        meta[part] = _tokenize(part, documents, tokenizer, folder, report)
    made = [folder / name for name in (*ARRAYS, "tokenizer/tokenizer.json")]
    meta["fingerprint"] = hashlib.blake2b("".join(_digests(made).values()).encode(), digest_size=16).hexdigest()
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
