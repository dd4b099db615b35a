"""Controls: a model with something taken away, to see whether that was what helped. By name, as in RECIPE@one-row.

A control changes a model after it has been made and before it is trained or trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from byrote.memory import MemoryStack, Ticket
from byrote.models.engram import EngramForCausalLM


def address_one_row(model: EngramForCausalLM) -> None:
    """Every n-gram reads the first row of its column: what is left of a memory that does not look anything up."""
    stack = model.memory_stack
    if stack is None:
        raise ValueError("one-row needs memories and the recipe has none: set model.memory_layers")
    stack.register_forward_hook(_first_rows)


def _first_rows(stack: MemoryStack, inputs: Any, tickets: Mapping[int, Ticket]) -> dict[int, Ticket]:
    replaced = {}
    for layer_id, ticket in tickets.items():
        first = torch.tensor(stack.spec.layer(layer_id).offsets, device=ticket.rows.device)
        replaced[layer_id] = dataclasses.replace(ticket, rows=first.expand_as(ticket.rows).contiguous())
    return replaced


CONTROLS: dict[str, Callable[[EngramForCausalLM], None]] = {"one-row": address_one_row}
