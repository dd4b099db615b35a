"""What the gates of a model's memories do on one text: recorded, saved, shown in a terminal or as a web page.

A gate is how much of what a memory layer has looked up enters a residual stream at one token: 0 nothing, 1
all of it (Engram paper, section 6.5). Colors are the mean over the streams.

Shapes: gates [layers, T, streams].  Left out: padding and batches, one trace is one text.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.color import Color
from rich.console import Group, RenderableType
from rich.style import Style
from rich.text import Text

from byrote.data.tokenizer import encode_prompt, shown
from byrote.lab.inspect.page import fill
from byrote.nn.engram import Engram
from byrote.tables.files.headers import check_fields, parse_object

FORMAT_VERSION = 1
CLOSED, OPEN = (38, 43, 49), (244, 185, 66)
BRIGHT, DARK = Color.from_rgb(230, 232, 234), Color.from_rgb(26, 20, 5)
EXTREMES = 5


@dataclass(frozen=True, eq=False)
class GateTrace:
    """The gates of one text: `gates` float32 [layers, tokens, streams] in [0, 1]. ValueError where the shapes
    disagree.
    """

    tokens: list[str]
    gates: np.ndarray
    layer_ids: list[int]

    def __post_init__(self) -> None:
        if self.gates.ndim != 3 or self.gates.shape[:2] != (len(self.layer_ids), len(self.tokens)):
            raise ValueError(
                f"gates has shape {self.gates.shape} beside {len(self.layer_ids)} layers and "
                f"{len(self.tokens)} tokens: give [layers, tokens, streams]"
            )
        if not self.gates.size:
            raise ValueError(f"gates has shape {self.gates.shape}, it is empty: record at least one token")

    @property
    def scale(self) -> tuple[float, float]:
        """The ends of the color scale: the range of the gates, opened to tenths so that noise stays dim."""
        low, high = float(self.gates.min()), float(self.gates.max())
        return math.floor(low * 10) / 10, max(math.ceil(high * 10), math.floor(low * 10) + 1) / 10

    def save(self, path: str | PathLike[str]) -> None:
        record = {
            "format_version": FORMAT_VERSION,
            "tokens": self.tokens,
            "layer_ids": self.layer_ids,
            "gates": self.gates.astype(np.float32).tolist(),
        }
        Path(path).write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> GateTrace:
        record = parse_object(Path(path).read_bytes(), str(path))
        if record.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version={record.get('format_version')}, this program reads {FORMAT_VERSION}"
                ": record the trace again"
            )
        check_fields(record, {"tokens": list, "gates": list, "layer_ids": list}, str(path))
        return cls(record["tokens"], np.asarray(record["gates"], dtype=np.float32), record["layer_ids"])


@torch.no_grad()
def record(model: torch.nn.Module, tokenizer: Any, text: str) -> GateTrace:
    """Run `text` through the model once and keep every memory's gates."""
    memories = {name: module for name, module in model.named_modules() if isinstance(module, Engram)}
    if not memories:
        raise ValueError("the model has no Engram layer, so there are no gates: give a model with a memory")
    ids = encode_prompt(tokenizer, text)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        memory.gate.register_forward_hook(lambda _module, _inputs, gates, name=name: seen.update({name: gates}))
        for name, memory in memories.items()
    ]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        model(input_ids=torch.tensor([ids], device=device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    gates = torch.stack([seen[name][0].float().cpu() for name in memories]).numpy()
    return GateTrace(shown(tokenizer, ids), gates, _layer_ids(list(memories)))


def _layer_ids(names: list[str]) -> list[int]:
    """`model.layers.3.memory` is layer 3; modules without a number count up."""
    numbers = [re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name) for name in names]
    return [int(found[-1]) if found else place for place, found in enumerate(numbers)]


def visible(token: str) -> str:
    """The token with its white space shown: an inner blank stays a blank, one that stands alone does not."""
    token = token.replace(" ", "␣") if token.isspace() else token
    marks = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\xa0": "⍽"}
    shown = (marks.get(c) or (c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in token)
    return "".join(shown) or "∅"


def to_terminal(trace: GateTrace) -> RenderableType:
    """The text once per memory layer, each token on the color of its gate, for a rich console."""
    low, high = trace.scale
    parts: list[RenderableType] = [_legend(low, high)]
    for layer_id, gates in zip(trace.layer_ids, trace.gates.mean(axis=-1), strict=True):
        heading = Text(f"\nlayer {layer_id}", style="bold")
        heading.append(f"  mean {gates.mean():.3f}, from {gates.min():.3f} to {gates.max():.3f}", style="not bold dim")
        body = Text(overflow="fold")
        for token, gate in zip(trace.tokens, gates, strict=True):
            body.append(visible(token), style=_style((gate - low) / (high - low)))
            if "\n" in token:
                body.append("\n")
        body.rstrip()
        order = np.argsort(-gates, kind="stable")
        parts += [heading, body]
        parts += [_extremes("most open", trace.tokens, gates, order[:EXTREMES])]
        parts += [_extremes("least open", trace.tokens, gates, order[::-1][:EXTREMES])]
    return Group(*parts)


def _legend(low: float, high: float) -> Text:
    legend = Text(f"gate {low:.1f} ")
    for step in range(21):
        legend.append(" ", style=_style(step / 20))
    return legend.append(f" {high:.1f}")


def _extremes(label: str, tokens: list[str], gates: np.ndarray, places: np.ndarray) -> Text:
    line = Text(f"{label + ':':<12}", style="dim")
    for place in places:
        line.append(f"{visible(tokens[place]).strip()} ", style="not dim").append(f"{gates[place]:.3f} @{place}   ")
    line.rstrip()
    return line


def _style(share: float) -> Style:
    """From dark to bright, with the text in whichever of the two can be read on it."""
    red, green, blue = (round(a + (b - a) * float(share)) for a, b in zip(CLOSED, OPEN, strict=True))
    return Style(color=BRIGHT if share < 0.6 else DARK, bgcolor=Color.from_rgb(red, green, blue))


def to_html(trace: GateTrace, title: str) -> str:
    """One page that needs nothing but itself."""
    data = {
        "tokens": [visible(token) for token in trace.tokens],
        "breaks": [place for place, token in enumerate(trace.tokens) if "\n" in token],
        "layers": trace.layer_ids,
        "gates": [[[round(gate, 4) for gate in token] for token in layer] for layer in trace.gates.tolist()],
        "scale": trace.scale,
    }
    return fill("gates.html", title, data)
