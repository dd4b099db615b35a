"""Decoupled muP in the optimizer (DLCM, arXiv 2512.24617, section 6.1, Eq. 18-21): rates that hold at other widths.

A model's `mup_groups() -> {parameter name: (group, s)}` gives each parameter a group and s, the width it reads from
over a base width; token and concept widths are two. Of Adam:

    group       what                               rate                 eps        initial std (the model's part)
    token       reads a token-wide vector          lr * token / s       eps / s    base / sqrt(s)
    concept     reads a concept-wide vector        lr * concept / s     eps / s    base / sqrt(s)
    embedding   embedding and head                 lr * others          eps        base
    others      gains, biases, and the like        lr * others          eps        its own

`token`, `concept`, `others` are base rates as multiples of `lr`, found once at the base width; the paper finds the
first two about equal. Logits are multiplied by 1 / s_token in the model. So the head is no hidden matrix: with that
factor it starts and moves as an embedding does (Tensor Programs V, 2203.03466, table 8); the paper does not say.

Kinds and decay stay as they are: AdamW decays by rate * decay, so a scaled matrix forgets s times as slowly (the paper
is silent). The rows of tables keep their rate, as embeddings do.
Left out: Muon, whose steps follow another rule; depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

GROUPS = ("embedding", "token", "concept", "others")
SCALED = ("token", "concept")
Place = tuple[str, float]  # group, s


@dataclass(frozen=True, kw_only=True)
class MuP:
    """Multiples of the rate for parameters whose width is that of tokens, of concepts, or of neither (see above)."""

    token: float = 1.0
    concept: float = 1.0
    others: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; give a multiple of lr, above 0")

    def split(self, groups: list[dict[str, Any]], model: nn.Module, eps: float) -> list[dict[str, Any]]:
        """The same parameters in the same kinds, one group for each place; `mup` of a group names it."""
        places = _places(model)
        made = []
        for group in groups:
            if group["kind"] == "muon":
                raise ValueError("mup scales Adam's steps, and Muon's follow another rule: leave out one of the two")
            if group["kind"] == "rows":
                made.append(group)
                continue
            here = {places[id(parameter)] for parameter in group["params"]}
            for name, s in sorted(here, key=lambda place: (GROUPS.index(place[0]), place[1])):
                parameters = [p for p in group["params"] if places[id(p)] == (name, s)]
                rate = group["lr"] * (getattr(self, name) if name in SCALED else self.others) / s
                made.append({**group, "params": parameters, "lr": rate, "eps": eps / s, "mup": name})
        return made


def _places(model: nn.Module) -> dict[int, Place]:
    """Of each parameter, by its id; s is 1 in groups that no width scales."""
    find = getattr(model, "mup_groups", None)
    if find is None:
        raise ValueError(f"{type(model).__name__} has no mup_groups() -> {{parameter name: (group, s)}}; leave out mup")
    named, given, places = dict(model.named_parameters()), find(), {}
    for name in sorted(named.keys() ^ given.keys()):
        lack = "is not in mup_groups()" if name in named else "of mup_groups() is no parameter"
        raise ValueError(f"{name} {lack} of {type(model).__name__}: give every parameter one place")
    for name, (group, s) in given.items():
        if group not in GROUPS:
            raise ValueError(f"{name} is in group {group!r}; there are {', '.join(GROUPS)}")
        if not (math.isfinite(s) and s > 0):
            raise ValueError(f"{name} has s={s}; it is width / base width, above 0")
        places[id(named[name])] = (group, float(s) if group in SCALED else 1.0)
    return places
