"""Each format that a package ships, on a file of that format made here."""

import gzip
import json
import struct
import tarfile
import zipfile
import zlib

import pytest

from byrote.data import packages
from byrote.data.corpora import CORPORA, corpus
from byrote.data.extract import (
    dictd_entries,
    html_text,
    novel_chapters,
    poems,
    r_strings,
    sword_chapters,
    wordnet_entries,
)


def test_html():
    page = "<html><head><title>no</title></head><p>One &amp;\n two<br>three</p>"
    page += "<script>no()</script><div>four</div>"
    assert html_text(page) == "One & two\nthree\n\nfour"


def test_dictd(tmp_path):
    text = "00-database-info\n   about\n\nAbacus \\Ab\\, n.\n   A {frame}.\n\n"
    text += "   Syn: counter.\n\nAbaft\n   Behind.\n"
    (tmp_path / "x.dict.dz").write_bytes(gzip.compress(text.encode()))
    entries = [entry.text for entry in dictd_entries(tmp_path / "x.dict.dz")]
    assert entries == ["Abacus \\Ab\\, n.\n   A frame.\n\n   Syn: counter.", "Abaft\n   Behind."]


def test_wordnet(tmp_path):
    line = "00977301 04 n 02 first_strike 2 blow(a) 0 001 @ 00972621 n 0000 | a sudden attack  \n"
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("  1 licence | text\n" + (line if part == "noun" else ""))
    [entry] = wordnet_entries(tmp_path)
    assert entry.text == "first strike, blow (noun): a sudden attack"


def test_r_data_and_chapters():
    def string(text: str) -> bytes:
        return b"\x00\x04\x00\x09" + struct.pack(">i", len(text)) + text.encode()

    long = ["It is a truth universally acknowledged,", "that a single man"] * 8
    records = []
    for lines in (["EMMA", "", "CHAPTER I", "", *long, "", "The end.", "CHAPTER II", "", *long], ["b"]):
        record = zlib.compress(b"X\n" + b"".join(string(line) for line in lines))
        records.append(struct.pack(">i", len(record)) + record)
    first, second = r_strings(b"".join(records))
    assert first[0] == "EMMA" and second == ["b"]
    chapters = list(novel_chapters("Emma", first))
    assert [name for name, _ in chapters] == ["Emma-01", "Emma-02"]
    assert chapters[0].text.split("\n")[0] == "CHAPTER I" and chapters[0].text.endswith("\nThe end.")
    assert "acknowledged, that a single man" in chapters[0].text


def test_sword(tmp_path):
    book = (
        b'<title>Ruth</title><chapter osisID="Ruth.1" sID="Ruth.1"/><div sID="g1" type="x-p"/>'
        b'<w lemma="s:1">In</w> the days<note n="a">or: time</note>.<div eID="g1"/> <div sID="g2"/>'
        b'And<chapter eID="Ruth.1"/> tail'
    )
    block = zlib.compress(book)
    for testament in ("ot", "nt"):
        (tmp_path / f"{testament}.bzs").write_bytes(struct.pack("<III", 0, len(block), len(book)))
        (tmp_path / f"{testament}.bzz").write_bytes(block)
    assert next(iter(sword_chapters(tmp_path))) == ("Ruth.1", "In the days.\nAnd")


def test_poems(tmp_path):
    poem = {"title": "静夜思", "author": "李白", "paragraphs": ["床前", "明月"]}
    (tmp_path / "a.json").write_text(json.dumps([poem, 3, {"name": "李白", "desc": "字太白"}]))
    (tmp_path / "b.json").write_text("{broken")
    assert [text for _, text in poems(tmp_path)] == ["静夜思 李白\n床前\n明月", "李白\n字太白"]


def test_corpus_names():
    assert set(CORPORA) >= {
        "factbook",
        "prose",
        "gcide",
        "wordnet",
        "sotu",
        "austen",
        "bible",
        "chinese-poetry",
    }
    assert all(c.licence and c.source and c.about for c in CORPORA.values())
    with pytest.raises(ValueError, match="did you mean 'factbook'"):
        corpus("factbok")


def test_packages_are_unpacked_once_and_a_missing_tool_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`npm` is not on this machine"):
        monkeypatch.setattr(packages.shutil, "which", lambda tool: None)
        packages.npm("x@1", tmp_path)
    monkeypatch.undo()
    # A stand-in for the client: it writes the archive where `npm pack` would.
    source = tmp_path / "index.txt"
    source.write_text("hello")
    make = "import tarfile\nwith tarfile.open('x.tgz', 'w:gz') as file:\n"
    make += f"    file.add({str(source)!r}, 'package/index.txt')"
    command = [packages.sys.executable, "-c", make]
    folder = packages._unpacked("npm", "@scope/x@1", tmp_path / "packages", command, needs=())
    assert (folder / "package/index.txt").read_text() == "hello"
    assert packages._unpacked("npm", "@scope/x@1", tmp_path / "packages", ["false"], needs=()) == folder
    with pytest.raises(ValueError, match="could not fetch the debian package y"):
        packages._unpacked("debian", "y", tmp_path / "packages", ["false"], needs=())
    assert not (tmp_path / "packages/debian-y").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_unpack(tmp_path, kind):
    (tmp_path / "f.txt").write_text("x")
    archive = tmp_path / ("a.whl" if kind == "zip" else "a.tar.gz")
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.write(tmp_path / "f.txt", "f.txt")
    else:
        with tarfile.open(archive, "w:gz") as file:
            file.add(tmp_path / "f.txt", "f.txt")
    packages.unpack(archive, tmp_path / "out")
    assert (tmp_path / "out/f.txt").read_text() == "x"
