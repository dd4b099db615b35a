"""What the web pages of the lab share: colors, type, keys; and how data gets into a page that needs nothing else."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any


def fill(name: str, title: str, data: Any) -> str:
    """The page `name`, with its {{style}}, {{script}}, {{title}} and, as JSON in a script element, {{data}}."""
    parts = files("byrote.lab.inspect")
    # Inside a script element only "<" could end the data early.
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = parts.joinpath(name).read_text("utf-8")
    for mark, text in (("style", "page.css"), ("script", "page.js")):
        page = page.replace(f"{{{{{mark}}}}}", parts.joinpath(text).read_text("utf-8").rstrip())
    return page.replace("{{title}}", html.escape(title)).replace("{{data}}", written)
