"""Where a model with concepts cuts one text: recorded, shown in a terminal or as a web page.

The probability of a boundary depends on the encoder alone, not on the boundaries before it. So one forward tells where
the text would be cut at any threshold, and the page has a slider for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.style import Style
from rich.text import Text

from byrote.data.tokenizer import encode_prompt, shown
from byrote.lab.inspect.gates import visible
from byrote.lab.inspect.page import fill

SHADES = (Style(bgcolor="#1f3d3f", color="#e6e8ea"), Style(bgcolor="#4a3510", color="#e6e8ea"))
UNSURE = 5


@dataclass(frozen=True, eq=False)
class SegmentTrace:
    """tokens, and of each the probability [T] that it is a boundary; from `threshold` on it is one. Under `opens` a
    boundary token begins a segment, otherwise it ends one.
    """

    tokens: list[str]
    probabilities: np.ndarray
    threshold: float
    opens: bool

    @property
    def boundaries(self) -> np.ndarray:
        return self.probabilities >= self.threshold

    @property
    def segments(self) -> list[list[int]]:
        """The places of the tokens of each segment. The last one may still be open: not a concept yet."""
        cuts = np.flatnonzero(self.boundaries) + (0 if self.opens else 1)
        parts = np.split(np.arange(len(self.tokens)), cuts)
        return [part.tolist() for part in parts if len(part)]


@torch.no_grad()
def record(model: torch.nn.Module, tokenizer: Any, text: str) -> SegmentTrace:
    """Run `text` through the model once."""
    config: Any = model.config
    if not getattr(config, "num_concept_layers", 0):
        raise ValueError("the model has no concepts, so there are no segments: train one with recipes/dlcm-tiny.toml")
    ids = encode_prompt(tokenizer, text)
    if not ids:
        raise ValueError("the text has no tokens: give some")
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        found = model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    finally:
        model.train(training)
    p = found.boundary_probabilities[0].float().cpu().numpy()
    opens = config.boundary_convention != "close"
    return SegmentTrace(shown(tokenizer, ids), p, config.boundary_threshold, opens)


def summary(trace: SegmentTrace) -> str:
    concepts = int(trace.boundaries.sum())
    return f"{len(trace.tokens)} tokens, {concepts} concepts, {len(trace.tokens) / concepts:.2f} tokens a concept"


def to_terminal(trace: SegmentTrace) -> RenderableType:
    """The text with its segments on two colors in turn, boundary tokens underlined."""
    body = Text(overflow="fold")
    for number, places in enumerate(trace.segments):
        for place in places:
            style = SHADES[number % 2]
            if trace.boundaries[place]:
                style += Style(bold=True, underline=True)
            body.append(visible(trace.tokens[place]), style=style)
            if "\n" in trace.tokens[place]:
                body.append("\n")
    body.rstrip()
    unsure = np.argsort(np.abs(trace.probabilities - trace.threshold), kind="stable")[:UNSURE]
    line = Text("least sure: ", style="dim")
    for place in unsure:
        line.append(f"{visible(trace.tokens[place]).strip()} ", style="not dim")
        line.append(f"{trace.probabilities[place]:.3f} @{place}   ")
    line.rstrip()
    kind = "begins" if trace.opens else "ends"
    return Group(Text(f"{summary(trace)}; an underlined token {kind} one", style="bold"), body, line)


def to_html(trace: SegmentTrace, title: str) -> str:
    """One page that needs nothing but itself."""
    data = {
        "tokens": [visible(token) for token in trace.tokens],
        "breaks": [place for place, token in enumerate(trace.tokens) if "\n" in token],
        "p": [round(float(p), 5) for p in trace.probabilities],
        "threshold": trace.threshold,
        "opens": trace.opens,
    }
    return fill("concepts.html", title, data)
