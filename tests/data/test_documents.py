"""Cleaning, de-duplication, the split; the Factbook as the real case."""

import pytest

from byrote.data.documents import Document, clean, deduplicate, read_jsonl, split, write_jsonl
from byrote.data.factbook import country_text, factbook_documents

LONG = "a note on how these figures were estimated, the same in each of the countries"


def test_clean_closes_up_blanks_and_keeps_indentation():
    assert clean("a  b \r\n\r\n\r\n\r\n  c\x00\ufeff\u00a0d ") == "a b\n\n  c d"
    assert clean("e\u0301") == "\u00e9"


def test_deduplicate_drops_repeated_documents_and_long_lines_but_not_short_ones():
    documents = [
        Document("a", f"Suffrage: universal\n{LONG}\nalpha"),
        Document("b", f"Suffrage: universal\n{LONG}\nbeta"),
        Document("c", f"Suffrage: universal\n{LONG}\nbeta"),
        Document("d", LONG),
    ]
    assert list(deduplicate(documents)) == [documents[0], Document("b", "Suffrage: universal\nbeta")]


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
    train, validation = split(list(deduplicate(factbook_documents())), 0.09)
    assert 20 <= len(validation) <= 26 and len(train) > 220
    assert not {d.name for d in train} & {d.name for d in validation}
    sizes = [sum(len(d.text.encode()) for d in part) for part in (train, validation)]
    assert sum(sizes) > 5e6 and 0.07 < sizes[1] / sum(sizes) < 0.11
    long_lines = [line for d in train + validation for line in d.text.split("\n") if len(line) >= 60]
    assert len(long_lines) == len(set(long_lines))
    for document in train + validation:
        facts = [line for line in document.text.split("\n") if line]
        assert len(facts) == len(set(facts)) and "<" not in document.text.replace("<$", "")[:2000]
