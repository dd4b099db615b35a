"""How large a model is, and what a token costs it: the numbers that a comparison has to hold equal."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, and floating-point operations of training on one token.

    What `active` and the operations hold is for each family to say.
    """

    total: int
    active: int
    table: int
    experts: int
    prediction: int
    flops_per_token: int
