"""Documents: a name and a text. Cleaning, de-duplication, the split, and the two JSON-lines files of a
corpus.

Order is everything for reproducibility: every function here keeps the order it is given or sorts by a hash of
the names, and none looks at a clock or at a random generator.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# A line shorter than this may repeat: "Suffrage: 18 years of age; universal" is a fact about each country.
# A longer line that repeats is boilerplate, and would leak from training into validation.
REPEATED_LINE = 60


class Document(NamedTuple):
    name: str
    text: str


def clean(text: str) -> str:
    """Unicode composed, control characters and trailing blanks gone, runs of blanks and of empty lines
    closed up.
    """
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ")
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\u200b]", "", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"(?<=\S)[ \t]{2,}", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def deduplicate(documents: Iterable[Document]) -> Iterator[Document]:
    """Drop documents seen before, and long lines seen before in this or any earlier document."""
    texts: set[bytes] = set()
    lines: set[bytes] = set()
    for name, text in documents:
        if _seen(text, texts):
            continue
        kept = [
            line for line in text.split("\n") if len(line.strip()) < REPEATED_LINE or not _seen(line.strip(), lines)
        ]
        shortened = clean("\n".join(kept))
        if shortened:
            yield Document(name, shortened)


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
