"""How new tokens enter a model: checked, placed, their rows on the way, embedded, and known to the decode state."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from transformers.cache_utils import Cache

from byrote.address.hashing import check_known
from byrote.memory import MemoryState, Sequence, Ticket
from byrote.models.inputs import check_places
from byrote.models.place import length, place


class Entered(NamedTuple):
    """x [B, T, d], the embeddings; mask as `byrote.models.place.place` gives it; tickets of the memories, by layer."""

    x: Tensor
    sequence: Sequence
    mask: Tensor | None
    state: MemoryState | None
    tickets: dict[int, Ticket]


def enter(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    inputs_embeds: Tensor | None,
) -> Entered:
    """`model` has `embed_tokens`, `memories`, `attach_memory_state(cache)` and `begin(state, rows, device)`."""
    past = length(cache)
    check_places(input_ids, attention_mask, position_ids, int(past))
    state = None if cache is None else model.attach_memory_state(cache)
    if state is not None:
        model.begin(state, len(input_ids), input_ids.device)
    sequence, mask = place(input_ids, attention_mask, position_ids, past, cache, state)
    tickets: dict[int, Ticket] = {}
    if model.memories is None:
        check_known(input_ids, model.config.vocab_size, sequence.alive)
    else:
        tickets = model.memories(input_ids, sequence, state)
    # From here on nothing is refused. Only what stands under padding may still be no id.
    x = inputs_embeds
    if x is None:
        x = model.embed_tokens(input_ids.clamp(0, model.config.vocab_size - 1))
    if state is not None:
        state.advance("position", sequence.position_ids, sequence)
        state.advance("document", sequence.document, sequence)
    return Entered(x, sequence, mask, state, tickets)
