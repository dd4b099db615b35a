"""Cleaning, de-duplication, the split; the Factbook as the real case."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from byrote.data.documents import PIECE, Document, Found, clean, cleaned, cut, read_jsonl, split, write_jsonl
from byrote.data.factbook import country_text, factbook_documents

LONG = "a note on how these figures were estimated, the same in each of the countries"


def test_clean_closes_up_blanks_and_keeps_indentation():
    assert clean("a  b \r\n\r\n\r\n\r\n  c\x00\ufeff\u00a0d ") == "a b\n\n  c d"
    assert clean("e\u0301") == "\u00e9"


@given(st.text(st.sampled_from("ae\u0301\u00e9 \t\n\r\x0b\x85\u00a0\u200b\ufeff\u2028x")))
def test_to_clean_twice_is_to_clean_once(text):
    assert clean(clean(text)) == clean(text)


def test_repeated_documents_and_long_lines_are_dropped_but_not_short_ones():
    texts = [
        Found("x", "a", f"Suffrage: universal\n{LONG}\nalpha"),
        Found("x", "b", f"Suffrage: universal\n{LONG}\nbe  ta"),
        Found("x", "c", f"Suffrage: universal\n{LONG}\nbeta\n"),
        Found("x", "d", f"Suffrage: universal\n{LONG}\nbe ta"),
        Found("y", "e", LONG),
    ]
    counts = {}
    assert list(cleaned(texts, counts)) == [
        Document("a", texts[0].text),
        Document("b", "Suffrage: universal\nbe ta"),
        Document("c", "Suffrage: universal\nbeta"),
    ]
    assert counts["x"].to_dict() == {
        "documents": 4, "documents_changed": 2, "documents_dropped": 1, "lines_changed": 1, "lines_dropped": 5,
        "bytes": sum(len(found.text) for found in texts[:4]),
        "bytes_dropped": 2 * len(LONG) + 2 + 1 + 1 + len(texts[3].text),
    }  # fmt: skip
    assert (counts["y"].documents, counts["y"].documents_dropped, counts["y"].bytes_dropped) == (1, 1, len(LONG))
    off: dict = {}
    assert [text for _, text in cleaned(texts, off, change=False)] == [found.text for found in texts]
    assert "left as they are" in str(off["x"]) and "1 dropped" in str(counts["y"])


def test_code_is_left_as_it_is():
    code = f"def f():\n    x  =  1\n\n\n\n    return x\t\n# {LONG}\n# {LONG}\r\n"
    texts = [Found(".py", "a", code, prose=False), Found(".py", "b", code + "\n", prose=False), Found(".py", "c", " ")]
    counts = {}
    assert [text for _, text in cleaned(texts, counts)] == [code, code + "\n"]
    assert (counts[".py"].documents_changed, counts[".py"].documents_dropped) == (0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 3 * PIECE,
        "word " * PIECE,
        "line of words\n" * PIECE,
        "line\n\n" * PIECE,
        "a\n\n" + "b c " * PIECE,
        "水" * 70_000,
    ],
)
def test_a_long_text_is_cut_whatever_it_is_made_of(text):
    pieces = list(cut(text))
    assert "".join(pieces) == text and len(pieces) > 2
    assert all(PIECE <= len(piece) < 2 * PIECE for piece in pieces[1:-1])
    assert list(cut("short\n\ntext")) == ["short\n\ntext"]


def test_split_is_by_name_and_keeps_the_order():
    documents = [Document(f"n{i}", f"text {i}") for i in range(100)]
    train, validation = split(documents, 0.09)
    assert len(validation) == 9 and sorted(train + validation) == sorted(documents)
    assert [d for d in documents if d in train] == train
    again = split([Document(d.name, d.text + " edited") for d in documents], 0.09)[1]
    assert [d.name for d in again] == [d.name for d in validation]
    assert [len(part) for part in split(documents[:2], 0.01)] == [1, 1]
    with pytest.raises(ValueError, match="at least 2 are needed"):
        split(documents[:1], 0.09)


def test_jsonl_round_trip(tmp_path):
    documents = [Document("a", "line\nline \u00e9\u2028"), Document("b", '"quoted"')]
    write_jsonl(documents, tmp_path / "x.jsonl")
    assert read_jsonl(tmp_path / "x.jsonl") == documents


def test_country_text_has_a_line_for_each_fact():
    country = {
        "Introduction": {"Background": {"text": "<p>First&nbsp;age.</p><p>Second <em>age</em>.</p>"}},
        "People": {
            "Water": {"improved: urban": {"text": "urban: 86%"}, "note": "<b>note:</b> of all"},
            "Exports": {"Exports 2023": {"text": "$1"}},
            "Languages": {"major-language sample(s)": {"text": "Der World Factbook"}},
        },
        "Government": {"Country name": {"conventional short form": {"text": "Freedonia"}}},
    }
    assert country_text(country) == (
        "Freedonia\n\nIntroduction\nBackground: First age.\nSecond age.\n\n"
        "People\nWater, improved: urban: 86%\nnote: of all\nExports 2023: $1\n\n"
        "Government\nCountry name, conventional short form: Freedonia"
    )


def test_factbook_split_leaks_nothing():
    train, validation = split(list(cleaned((Found("x", *found) for found in factbook_documents()), {})), 0.09)
    assert 20 <= len(validation) <= 26 and len(train) > 220
    assert not {d.name for d in train} & {d.name for d in validation}
    sizes = [sum(len(d.text.encode()) for d in part) for part in (train, validation)]
    assert sum(sizes) > 5e6 and 0.07 < sizes[1] / sum(sizes) < 0.11
    long_lines = [line for d in train + validation for line in d.text.split("\n") if len(line) >= 60]
    assert len(long_lines) == len(set(long_lines))
    for document in train + validation:
        facts = [line for line in document.text.split("\n") if line]
        assert len(facts) == len(set(facts)) and "<" not in document.text.replace("<$", "")[:2000]
