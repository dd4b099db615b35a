"""What the web pages of the lab share: colors, type, and how data gets into a page that needs nothing but itself."""

from __future__ import annotations

import html
import json
from typing import Any

STYLE = """:root {
  color-scheme: light dark;
  --page: #faf8f4; --card: #ffffff; --line: #e4dfd5; --ink: #22262b; --soft: #6c7178;
  --closed: #eef3f1; --open: #00676d; --on-open: #ffffff; --accent: #00676d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1b1f24; --line: #2e343b; --ink: #e6e8ea; --soft: #98a0a8;
    --closed: #23282e; --open: #f4b942; --on-open: #1a1405; --accent: #f4b942;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; padding: 2.5rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 62rem; margin: 0 auto; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 0; }
p { margin: 0; color: var(--soft); max-width: 46rem; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: .9rem;
  padding: 1.1rem 1.3rem 1.25rem; margin-bottom: 1.1rem;
}
#tip {
  position: fixed; z-index: 1; pointer-events: none;
  max-width: 20rem; padding: .5rem .7rem; border-radius: .5rem;
  background: var(--ink); color: var(--page); font-size: .8125rem; line-height: 1.45; white-space: pre-wrap;
  font-variant-numeric: tabular-nums; box-shadow: 0 4px 16px rgb(0 0 0 / .25);
}
#tip[hidden] { display: none; }
"""


def fill(page: str, title: str, data: Any) -> str:
    """The template with {{style}}, {{title}} and, as JSON in a script element, {{data}}."""
    # Inside a script element only "<" could end the data early.
    written = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return page.replace("{{style}}", STYLE).replace("{{title}}", html.escape(title)).replace("{{data}}", written)
