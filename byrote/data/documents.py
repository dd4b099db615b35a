"""Documents: a name and a text. Cleaning, de-duplication, the split, and the JSON-lines files of a corpus.

Prose is cleaned: Unicode composed, control characters and trailing blanks gone, runs of blanks and of empty lines
closed up, and a line of REPEATED_LINE characters or more that was seen before is dropped. In code and in markup each of
these changes what the text says, so they are left as they are. Of both, a document that was seen before is dropped.
What was changed and dropped is counted.

Order is everything for reproducibility: every function here keeps the order it is given or sorts by a hash of
the names, and none looks at a clock or at a random generator.
"""

import dataclasses
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# A line shorter than this may repeat: "Suffrage: 18 years of age; universal" is a fact about each country.
# A longer line that repeats is boilerplate, and would leak from training into validation.
REPEATED_LINE = 60
PIECE = 20_000  # characters


class Document(NamedTuple):
    """One document of a corpus: a name that says where it comes from, and its text."""

    name: str
    text: str


class Found(NamedTuple):
    """A text as it was found. `source`: what it is counted under, a kind of file or a corpus."""

    source: str
    name: str
    text: str
    prose: bool = True
    cut: bool = False  # into pieces, so that there is something to hold out


@dataclass
class Cleaning:
    """What became of the texts of one source. Empty lines at the end of a text do not count."""

    documents: int = 0
    documents_changed: int = 0
    documents_dropped: int = 0
    lines_changed: int = 0
    lines_dropped: int = 0
    bytes: int = 0
    bytes_dropped: int = 0

    def note(self, before: str, after: str) -> None:
        """One text, and what is left of it."""
        size, left = len(before.encode()), len(after.encode())
        self.documents += 1
        self.bytes += size
        self.bytes_dropped += size - left
        old, new = before.rstrip("\n"), after.rstrip("\n")
        self.documents_changed += bool(new) and old != new
        self.documents_dropped += not new
        if old == new:
            return
        was, is_now = Counter(old.split("\n")), Counter(new.split("\n") if new else [])
        dropped = max(0, was.total() - is_now.total())
        self.lines_dropped += dropped
        self.lines_changed += max(0, (was - is_now).total() - dropped)

    def __str__(self) -> str:
        if not self.bytes_dropped and not self.documents_changed and not self.documents_dropped:
            return f"{self.documents:,} documents, {self.bytes:,} bytes, left as they are"
        return (
            f"of {self.documents:,} documents {self.documents_changed:,} changed, {self.documents_dropped:,} dropped; "
            f"lines: {self.lines_changed:,} changed, {self.lines_dropped:,} dropped; "
            f"bytes: {self.bytes_dropped:,} of {self.bytes:,} gone"
        )

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def clean(text: str) -> str:
    """Prose, cleaned as the module's docstring says; to clean twice is to clean once."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\u200b]", "", text)
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"(?<=\S)[ \t]{2,}", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def cut(text: str, separators: tuple[str, ...] = ("\n\n", "\n", " ")) -> Iterator[str]:
    """Pieces of at least PIECE characters (but the last) that together are the text: cut at empty lines; where these
    are rare, at line ends; where these are, at blanks; or anywhere.
    """
    if not separators or len(text) <= PIECE:
        yield from (text[at : at + PIECE] for at in range(0, len(text), PIECE))
        return
    separator, finer = separators[0], separators[1:]
    if separator not in text:
        yield from cut(text, finer)
        return
    parts = text.split(separator)
    piece: list[str] = []
    length = 0
    for number, part in enumerate(parts):
        piece.append(part if number == len(parts) - 1 else part + separator)
        length += len(part)
        if length >= PIECE or number == len(parts) - 1:
            joined = "".join(piece)
            yield from [joined] if len(joined) < 2 * PIECE else cut(joined, finer)
            piece, length = [], 0


def cleaned(texts: Iterable[Found], counts: dict[str, Cleaning], change: bool = True) -> Iterator[Document]:
    """Documents to train on; `counts` tells, by source, what was done. Without `change`, only empty texts are dropped.

    A long line of prose, and a whole document, stay where they are seen first.
    """
    texts_seen: set[bytes] = set()
    lines_seen: set[bytes] = set()
    for found in texts:
        prose = change and found.prose
        whole = clean(found.text) if prose else found.text
        left = []
        for number, piece in enumerate(cut(whole) if found.cut else [whole]):
            text = piece.rstrip("\n") if prose else piece
            if not text.strip() or (change and _seen(text, texts_seen)):
                continue
            if prose:
                lines = text.split("\n")
                text = clean("\n".join(line for line in lines if not _repeated(line.strip(), lines_seen)))
            if text:
                yield Document(f"{found.name}#{number}" if found.cut else found.name, text)
                left.append(text + (piece[len(piece.rstrip("\n")) :] if prose else ""))
        counts.setdefault(found.source, Cleaning()).note(found.text, "".join(left))


def _repeated(line: str, before: set[bytes]) -> bool:
    return len(line) >= REPEATED_LINE and _seen(line, before)


def _seen(text: str, before: set[bytes]) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    if digest in before:
        return True
    before.add(digest)
    return False


def split(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """(train, validation): about `share` of the documents, those whose names hash lowest, are held out.

    By whole documents, so that nothing of a validation document is trained on; by name, so that a text
    that is edited stays on its side. Both parts keep the given order.
    """
    if len(documents) < 2:
        raise ValueError(
            f"the corpus has {len(documents)} document(s); at least 2 are needed, one for validation. "
            "Add files, or separate the documents of a JSON-lines file by lines."
        )
    count = min(max(1, round(share * len(documents))), len(documents) - 1)
    ranked = sorted(range(len(documents)), key=lambda i: (_rank(documents[i].name), i))
    held_out = set(ranked[:count])
    train = [document for i, document in enumerate(documents) if i not in held_out]
    return train, [document for i, document in enumerate(documents) if i in held_out]


def _rank(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def write_jsonl(documents: Iterable[Document], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"name": document.name, "text": document.text}, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[Document]:
    with open(path, encoding="utf-8") as file:
        return [Document(record["name"], record["text"]) for record in map(json.loads, file)]
