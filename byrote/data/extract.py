"""Text out of the formats that packages ship: HTML, dictd, WordNet, R data, SWORD modules, JSON poems.

Each function takes bytes or a folder of an unpacked package and gives text or documents; none of them
touches the network.
"""

import gzip
import html.parser
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from byrote.data.documents import Document, clean

TITLE_PAGE = 200  # characters; shorter pieces before and between the chapters of a novel are titles
_BLOCKS = {
    "p",
    "br",
    "div",
    "li",
    "tr",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "pre",
    "dt",
    "dd",
    "table",
    "section",
}
_SKIPPED = {"script", "style", "nav", "head", "footer"}


class _Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping += tag in _SKIPPED
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.skipping -= tag in _SKIPPED and self.skipping > 0
        if tag in _BLOCKS and tag != "br":
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(re.sub(r"\s+", " ", data))


def html_text(source: str) -> str:
    """The text of an HTML fragment or page; block tags become line breaks, inline tags and entities
    vanish.
    """
    parser = _Text()
    parser.feed(source)
    parser.close()
    lines = (re.sub(r"[ \u00a0]+", " ", line).strip() for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def dictd_entries(path: Path) -> Iterator[Document]:
    """A dictd dictionary (.dict.dz is gzip): entries begin at the left margin, after an empty line."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace").replace("{", "").replace("}", "")
    for number, entry in enumerate(re.split(r"\n\n(?=\S)", text)):
        # The first entries describe the dictionary file, not the language.
        if not entry.startswith("00-database"):
            yield Document(f"entry-{number:06d}", clean(entry))


def wordnet_entries(folder: Path) -> Iterator[Document]:
    """WordNet data.* files: `offset lexfile type n_words(hex) word lex_id ... | gloss`; a document is
    'words: gloss'.
    """
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("latin-1").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            words = [fields[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(int(fields[3], 16))]
            yield Document(f"{part}-{fields[0]}", clean(f"{', '.join(words)} ({part}): {gloss.strip()}"))


def r_strings(data: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database (.rdb), one list for each object.

    The file is a run of records, 4 bytes of length and a zlib stream; inside, R's XDR form, where a
    string (CHARSXP) is flags with low byte 9, a length and the bytes. Other kinds of object are not read.
    """
    position = 0
    while position < len(data):
        stream = zlib.decompressobj()
        record = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        strings, at = [], 0
        while (at := record.find(b"\x00\x04\x00\x09", at)) >= 0:
            length = struct.unpack(">i", record[at + 4 : at + 8])[0]
            if length < 0:  # NA
                at += 8
                continue
            strings.append(record[at + 8 : at + 8 + length].decode("utf-8", "replace"))
            at += 8 + length
        yield strings


def novel_chapters(title: str, lines: list[str]) -> Iterator[Document]:
    """Lines of a printed page -> chapters; lines of a paragraph are joined. Title pages are left out."""
    text = "\n".join(lines)
    for number, chapter in enumerate(re.split(r"\n(?=(?:CHAPTER|Chapter) [0-9IVXL]+)", text)):
        paragraphs = [re.sub(r"\s*\n\s*", " ", part).strip() for part in re.split(r"\n\s*\n", chapter)]
        chapter = clean("\n".join(part for part in paragraphs if part))
        if len(chapter) > TITLE_PAGE:
            yield Document(f"{title}-{number:02d}", chapter)


def sword_chapters(folder: Path) -> Iterator[Document]:
    """A compressed SWORD text module in OSIS mark-up: records of (offset, size, unpacked size) in .bzs,
    zlib blocks in .bzz.
    """
    for testament in ("ot", "nt"):
        index = (folder / f"{testament}.bzs").read_bytes()
        blocks = (folder / f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            book = zlib.decompress(blocks[offset : offset + size]).decode("utf-8", "replace")
            for name, chapter in re.findall(
                r'<chapter [^>]*sID="([^"]+)"[^>]*/>(.*?)<chapter [^>]*eID="\1"', book, flags=re.DOTALL
            ):
                chapter = re.sub(r"<note.*?</note>", "", chapter, flags=re.DOTALL)
                chapter = re.sub(r"<(?:div|lg|l|p)\b[^>]*>", "\n", chapter)
                text = clean(re.sub(r"<[^>]+>", "", chapter).replace("\x00", ""))
                yield Document(name, re.sub(r" *\n\s*", "\n", text))


def poems(folder: Path) -> Iterator[Document]:
    """JSON files of poems: title, author, and paragraphs (or content); or name and desc of a
    poet. A document is one poem, or one life.
    """
    for path in sorted(folder.rglob("*.json")):
        try:
            records = json.loads(path.read_text("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError):
            continue
        for number, record in enumerate(records if isinstance(records, list) else []):
            if not isinstance(record, dict):
                continue
            life = record.get("desc") or record.get("description")  # of a poet
            lines = record.get("paragraphs") or record.get("content") or (life and [life])
            if isinstance(lines, list) and lines and all(isinstance(line, str) for line in lines):
                head = [str(record[key]) for key in ("title", "rhythmic", "author", "name") if record.get(key)]
                name = f"{path.relative_to(folder).as_posix()}-{number}"
                yield Document(name, clean("\n".join([" ".join(head), *lines])))
