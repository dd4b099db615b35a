"""Where the new tokens of a forward stand, from what Hugging Face hands a model: mask, position ids, cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from byrote.memory import MemoryState, Sequence
from byrote.memory.sequence import NO_POSITION


def place(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past: int | Tensor,
    cache: Cache | None,
    state: MemoryState | None,
    single_sees_all: bool = False,
) -> tuple[Sequence, Tensor | None]:
    """The sequence of the new tokens, and the attention mask [B, 1, T, S] (None: plain causal).

    `single_sees_all`: attention takes None to mean that a single new token sees all of the cache, and is told so where
    nothing hides a part of it. Only a CPU is asked: a GPU would have to be waited for.
    """
    batch, steps = input_ids.shape
    known = int(past) + steps
    plain = attention_mask is None and position_ids is None and cache is None
    key_alive = (
        torch.ones(batch, known, dtype=torch.bool, device=input_ids.device)
        if attention_mask is None
        else attention_mask.bool()
    )
    last_position = input_ids.new_full((batch, 1), NO_POSITION)
    last_document = torch.zeros_like(last_position)
    if state is not None:
        last_position, last_document = state.tails["position"], state.tails["document"]
    if position_ids is None:  # the document goes on
        position_ids = (last_position.clamp_min(-1) + key_alive[:, -steps:].cumsum(dim=1)).clamp_min(0)
    position_ids = position_ids.expand(batch, -1)
    sequence = Sequence.place(position_ids, key_alive[:, -steps:], past, last_position, last_document)
    if plain:
        return sequence, None
    slots = max(known, cache.get_max_length(0)) if cache is not None else known
    if single_sees_all and steps == 1 and slots == known and _nothing_hidden(sequence, attention_mask):
        return sequence, None
    return sequence, sequence.mask(past, nn.functional.pad(key_alive, (0, slots - known)))


def _nothing_hidden(sequence: Sequence, attention_mask: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or sequence.document.device.type != "cpu":
        return False
    return not sequence.document.any() and (attention_mask is None or bool(attention_mask.all()))


def length(cache: Cache | None) -> int | Tensor:
    """Slots taken; a static cache counts in a tensor that it changes in place."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    return length.clone() if isinstance(length, Tensor) else length
