"""Where the new tokens of a forward stand, from what Hugging Face hands a model: mask, position ids, cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from byrote.compiled.loops import stepping
from byrote.memory import MemoryState, Sequence
from byrote.memory.sequence import NO_POSITION
from byrote.nn.mla import Cache as AttentionCache


def place(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past: int | Tensor,
    cache: Cache | None,
    state: MemoryState | None,
) -> tuple[Sequence, Tensor | None]:
    """The sequence of the new tokens, and the attention mask [B, 1, T, S].

    None for a mask: plain causal over new tokens that are all there is, or a single one that sees all of the cache.
    """
    batch, steps = input_ids.shape
    known = int(past) + steps
    plain = attention_mask is None and position_ids is None and cache is None
    if steps == 1 and state is not None and stepping(input_ids):
        return _step(attention_mask, position_ids, known, cache, state)
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
    return sequence, _mask(sequence, key_alive, past, cache)


def _step(
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    known: int,
    cache: Cache | None,
    state: MemoryState,
) -> tuple[Sequence, Tensor | None]:
    """`place` of one token a row behind a past, on a CPU."""
    last_position, last_document = state.tails["position"], state.tails["document"]
    rows = len(last_position)
    alive = torch.ones(rows, 1, dtype=torch.bool) if attention_mask is None else attention_mask[:, -1:].bool()
    position_ids = None if position_ids is None else position_ids.expand(rows, -1)
    sequence = Sequence.step(position_ids, alive, known - 1, last_position, last_document)
    seen = attention_mask is None or bool(attention_mask.all())
    if seen and not sequence.document.numpy().any() and _slots(cache, known) == known:
        return sequence, None
    key_alive = torch.ones(rows, known, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return sequence, _mask(sequence, key_alive, known - 1, cache)


def _mask(sequence: Sequence, key_alive: Tensor, past: int | Tensor, cache: Cache | None) -> Tensor:
    known = key_alive.shape[1]
    return sequence.mask(past, nn.functional.pad(key_alive, (0, _slots(cache, known) - known)))


def _slots(cache: Cache | None, known: int) -> int:
    return known if cache is None else max(known, cache.get_max_length(0))


def length(cache: Cache | None) -> int | Tensor:
    """Slots taken; a static cache counts in a tensor that it changes in place."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    return length.clone() if isinstance(length, Tensor) else length


def attention_cache(cache: Cache | None, layer: int) -> AttentionCache | None:
    """What the attention of a layer keeps its keys and values with."""
    if cache is None:
        return None
    return lambda key, value: cache.update(key, value, layer)
