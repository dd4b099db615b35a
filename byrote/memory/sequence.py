"""Where the new tokens of a forward stand: which are alive, where documents start, what a query may see.

One rule decides every boundary: a document starts where a position id is not its predecessor's plus one. The
predecessor of a token is the last alive token before it in its row, in this call or in an earlier one; padding is
not there at all. Memory windows, convolutions and attention all stop at a start.

B rows of T new tokens; S = slots of the attention cache with the new tokens in it; slot = index in that cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from byrote.compiled.loops import stepping

NO_POSITION = -2  # never the predecessor of a position: a first token always starts a document


@dataclass(frozen=True)
class Sequence:
    """position_ids int64 [B, T]; alive, starts bool [B, T]; document int64 [B, T], the slot of its document's start."""

    position_ids: Tensor
    alive: Tensor
    starts: Tensor
    document: Tensor

    @classmethod
    def place(
        cls, position_ids: Tensor, alive: Tensor, past: int | Tensor, last_position: Tensor, last_document: Tensor
    ) -> Sequence:
        """Find the starts. `past` slots are taken; last_position, last_document [B, 1] come from the decode state."""
        if position_ids.shape[1] == 1:  # a step of decoding: its predecessor is the last one
            starts = alive & (position_ids != last_position + 1)
            return cls(position_ids, alive, starts, last_document.masked_fill(starts, past))
        steps = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
        seen = torch.where(alive, steps, -1).cummax(dim=1).values
        before = torch.cat([seen.new_full((seen.shape[0], 1), -1), seen[:, :-1]], dim=1)
        predecessor = torch.where(before >= 0, position_ids.gather(1, before.clamp_min(0)), last_position)
        starts = alive & (position_ids != predecessor + 1)
        interrupted = alive[:, 1:] & ~alive[:, :-1] & ~starts[:, 1:]
        if interrupted.numel() and interrupted.any():
            row, step = (int(i) for i in interrupted.nonzero()[0])
            raise ValueError(
                f"attention_mask hides tokens inside a document: row {row} goes on at token {step + 1} behind padding. "
                "Pad at the left or the right of what one forward gets, or let position_ids begin a document behind it"
            )
        document = torch.maximum(torch.where(starts, steps + past, -1).cummax(dim=1).values, last_document)
        return cls(position_ids, alive, starts, document)

    @classmethod
    def step(
        cls, position_ids: Tensor | None, alive: Tensor, past: int, last_position: Tensor, last: Tensor
    ) -> Sequence:
        """`place` of one token a row on a CPU, where calling torch costs more than its work; `last` is the document.

        Without position_ids the documents go on.
        """
        living, before = alive.numpy(), last_position.numpy()
        position = np.maximum(np.maximum(before, -1) + living, 0) if position_ids is None else position_ids.numpy()
        starts = living & (position != before + 1)
        document = np.where(starts, past, last.numpy())
        position_ids = torch.from_numpy(position) if position_ids is None else position_ids
        return cls(position_ids, alive, torch.from_numpy(starts), torch.from_numpy(document))

    @cached_property
    def goes_on(self) -> bool:
        """Is this a step of decoding in which every row goes on with its document? False where asking costs more."""
        if self.alive.shape[1] != 1 or not stepping(self.alive):
            return False
        return bool(self.alive.numpy().all()) and not self.starts.numpy().any()

    def mask(self, past: int | Tensor, key_alive: Tensor) -> Tensor:
        """Attention mask bool [B, 1, T, S]: alive keys of the query's own document, not later than the query.

        A query always sees itself, so that a padded one stays finite. key_alive: bool [B, S].
        """
        queries = (torch.arange(self.alive.shape[1], device=self.alive.device) + past)[None, :, None]
        keys = torch.arange(key_alive.shape[1], device=self.alive.device)[None, None, :]
        visible = (keys <= queries) & (keys >= self.document[:, :, None]) & key_alive[:, None, :]
        return (visible | (keys == queries)).unsqueeze(1)


def carry(tail: Tensor, columns: Tensor, alive: Tensor, starts: Tensor, empty: float) -> Tensor:
    """What a window of the last L positions holds after these T columns: tail [B, L, ...], columns [B, T, ...].

    Entries before the current document are `empty`. Dead tokens behind the last alive one (right padding) leave no
    trace, and a row without an alive token keeps its tail: a padded row goes on as if it had not been padded.
    """
    length, steps = tail.shape[1], columns.shape[1]
    if steps == 1 and length > 0:
        kept = tail[:, 1:].masked_fill(_over(starts, tail), empty)
        return torch.where(_over(alive, tail), torch.cat([kept, columns.to(tail.dtype)], dim=1), tail)
    segment = starts.cumsum(dim=1)
    visible = torch.cat([(segment[:, -1:] == 0).expand(-1, length), segment == segment[:, -1:]], dim=1)
    entries = torch.cat([tail, columns.to(tail.dtype)], dim=1)
    entries = torch.where(_over(visible, entries), entries, torch.full_like(entries[:1, :1], empty))
    ends = torch.where(alive, torch.arange(1, steps + 1, device=tail.device), 0).amax(dim=1)
    index = ends[:, None] + torch.arange(length, device=tail.device)
    return entries.gather(1, _over(index, entries).expand(-1, -1, *entries.shape[2:]))


def _over(positions: Tensor, entries: Tensor) -> Tensor:
    """positions [B, T] shaped to broadcast over entries [B, T, ...]."""
    return positions.view(*positions.shape, *(1,) * (entries.dim() - 2))
