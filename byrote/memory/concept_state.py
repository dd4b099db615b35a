"""The decode state of a model with concepts: tails as every memory has them, and all that is kept of the concepts.

Rows of a batch form concepts at different steps, so that each row has a count of its own, `lengths`, and row b's next
concept goes to slot lengths[b] of these buffers (capacity grows by doubling; slots are dimension 1, or 2 of keys):

    document, position        where each concept formed; NOWHERE in slots without one
    <i>_key, <i>_value        of the attention of layer i of the concept transformer, [B, H, slots, n]
    read_key, read_value      of the attention from tokens to concepts, likewise
    smoothed                  what smoothing made of each; only while recording

and beside them the open segment (byrote.nn.pooling) and the last smoothed concept of each row.

A rollback takes away concepts and opens segments that were closed: while past recording is on the layer keeps the
encoder states and boundaries that it is given, and `crop` finds both again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from byrote.compiled.loops import stepping
from byrote.memory.sequence import Sequence
from byrote.memory.state import Field, MemoryState

NOWHERE = -1


@dataclass
class ConceptRecord:
    """Lengths, open segment and last smoothed concept as they were when recording began; and every token since."""

    lengths: Tensor
    open_total: Tensor
    open_count: Tensor
    last: Tensor | None
    states: list[Tensor] = field(default_factory=list)
    boundaries: list[Tensor] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)


class ConceptState(MemoryState):
    """The decode state of a model with concepts: `MemoryState`, and the slots of each row's concepts (see above)."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        super().__init__(fields)
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.slots: dict[str, Tensor] = {}
        self.lengths = self._counted = torch.empty(0, dtype=torch.int64)
        self._most = 0
        self.open_total = self.open_count = torch.empty(0)
        self.opens = False
        self.last: Tensor | None = None
        self.concept_record: ConceptRecord | None = None

    def begin_concepts(self, rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make empty buffers, unless some tokens are there already: what was refused leaves the batch size open."""
        if self.is_initialized:
            return
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.open_total = torch.zeros(rows, hidden_size, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.open_count = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def most(self) -> int:
        """Slots in use in any row."""
        if self._counted is not self.lengths:
            self._counted, self._most = self.lengths, int(self.lengths.max())
        return self._most

    def write(self, name: str, rows: Tensor, slots: Tensor, values: Tensor, most: int) -> None:
        """Keep values [N, ...] in the slots [N] of rows [N], all below `most`: ids as [N], keys as [N, H, n]."""
        keys = values.dim() == 3
        buffer = self.slots.get(name)
        if buffer is None or buffer.shape[2 if keys else 1] < most:
            buffer = _grown(buffer, len(self.lengths), most, values)
        elif (
            torch.is_grad_enabled()
            or buffer.requires_grad
            or buffer.is_inference() != torch.is_inference_mode_enabled()
        ):
            buffer = buffer.clone()  # a backward may need the old one, or it may not be written in this mode
        row: Tensor | int = rows
        slot: Tensor | int = slots
        if len(rows) == 1 and stepping(buffer):  # plain slices cost less than an index of tensors
            row, slot, values = int(rows), int(slots), values[0]
        if keys:
            buffer[row, :, slot] = values.to(buffer.dtype)
        else:
            buffer[row, slot] = values.to(buffer.dtype)
        self.slots[name] = buffer

    def read(self, name: str, rows: Tensor | None = None, most: int | None = None) -> Tensor:
        """The first `most` slots of `rows`; of all, unless given."""
        most = self.most if most is None else most
        buffer = self.slots[name]
        buffer = buffer[:, :, :most] if buffer.dim() == 4 else buffer[:, :most]
        return buffer if rows is None or len(rows) == len(buffer) else buffer.index_select(0, rows)

    def close(self, states: Tensor, boundaries: Tensor, sequence: Sequence, opens: bool) -> None:
        """Move on over new tokens, whose concepts are written: encoder states [B, T, d], boundaries [B, T].

        `opens`: a boundary token belongs to the segment behind it, not to the one before.
        """
        self._begin_record()
        if self.concept_record is not None:
            self.concept_record.states.append(states)
            self.concept_record.boundaries.append(boundaries)
            self.concept_record.alive.append(sequence.alive)
        if sequence.goes_on and not boundaries.any():  # most steps of decoding: each row's segment grows by its token
            self.open_total, self.open_count = self.open_total + states[:, 0], self.open_count + 1
            self.opens = opens
            return
        self._move(self.lengths, self.open_total, self.open_count, states, boundaries, sequence.alive, opens)

    def _move(
        self,
        lengths: Tensor,
        total: Tensor,
        count: Tensor,
        states: Tensor,
        boundaries: Tensor,
        alive: Tensor,
        opens: bool,
    ) -> None:
        seen = boundaries.cumsum(dim=1)
        waiting = alive & (seen == seen[:, -1:]) & (opens | ~boundaries)
        goes_on = seen[:, -1] == 0
        self.lengths = lengths + seen[:, -1]
        self.open_total = (states * waiting[..., None]).sum(dim=1, dtype=total.dtype) + total * goes_on[:, None]
        self.open_count = waiting.sum(dim=1) + count * goes_on
        self.opens = opens

    def _begin_record(self) -> None:
        if not self.record_past:
            self.concept_record = None
        elif self.concept_record is None:
            self.concept_record = ConceptRecord(self.lengths, self.open_total, self.open_count, self.last)

    def keep_last(self, rows: Tensor, slots: Tensor, smoothed: Tensor, ends: Tensor, most: int) -> None:
        """Keep what smoothing made of new concepts, [N, d]; `ends` bool [N]: the last of its row. Before `close`."""
        if self.last is None:
            self.last = smoothed.new_zeros(len(self.lengths), smoothed.shape[1])
        self._begin_record()
        if self.concept_record is not None:
            self.write("smoothed", rows, slots, smoothed, most)
        self.last = self.last.index_put((rows[ends],), smoothed[ends].to(self.last.dtype))

    @property
    def recorded(self) -> int:
        record = self.concept_record  # None of a model without concepts
        most = super().recorded
        return most if record is None else min(most, sum(part.shape[1] for part in record.states))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        record = self.concept_record
        if tokens_to_remove == 0 or record is None:
            return
        kept = sum(part.shape[1] for part in record.states) + tokens_to_remove
        for parts in (record.states, record.boundaries, record.alive):
            parts[:] = [torch.cat(parts, dim=1)[:, :kept]]
        tokens = record.states[0], record.boundaries[0], record.alive[0]
        if kept:
            self._move(record.lengths, record.open_total, record.open_count, *tokens, self.opens)
        else:
            self.lengths, self.open_total, self.open_count = record.lengths, record.open_total, record.open_count
        if "document" in self.slots:
            gone = torch.arange(self.slots["document"].shape[1], device=self.lengths.device) >= self.lengths[:, None]
            self.slots["document"] = self.slots["document"].masked_fill(gone, NOWHERE)
        self.last = record.last
        if "smoothed" in self.slots:
            rows = (self.lengths > record.lengths).nonzero().squeeze(1)
            last = self.slots["smoothed"][rows, self.lengths[rows] - 1]
            before = torch.zeros_like(self.slots["smoothed"][:, 0]) if self.last is None else self.last
            self.last = before.index_put((rows,), last)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._map(change)
        self.slots = {name: change(buffer) for name, buffer in self.slots.items()}
        record = self.concept_record
        for owner in (self,) if record is None else (self, record):
            for name in ("lengths", "open_total", "open_count", "last"):
                tensor = getattr(owner, name)
                setattr(owner, name, tensor if tensor is None else change(tensor))
        if record is not None:
            for parts in (record.states, record.boundaries, record.alive):
                parts[:] = [change(part) for part in parts]

    @property
    def nbytes(self) -> int:
        """Bytes that the concepts of all rows need, without what capacity there is beyond them."""
        taken = int(self.lengths.sum()) if len(self.lengths) else 0
        return sum(taken * buffer.nbytes // (len(buffer) * _slot_count(buffer)) for buffer in self.slots.values())


def _slot_count(buffer: Tensor) -> int:
    return buffer.shape[2 if buffer.dim() == 4 else 1]


def _grown(buffer: Tensor | None, rows: int, needed: int, values: Tensor) -> Tensor:
    """With room for `needed` slots and some more; NOWHERE in the new ones of ids."""
    capacity = max(16, 1 << (needed - 1).bit_length())
    shape = (
        (rows, values.shape[1], capacity, *values.shape[2:])
        if values.dim() == 3
        else (rows, capacity, *values.shape[1:])
    )
    grown = values.new_full(shape, 0 if values.is_floating_point() else NOWHERE)
    if buffer is not None:
        old = _slot_count(buffer)
        if buffer.dim() == 4:
            grown[:, :, :old] = buffer
        else:
            grown[:, :old] = buffer
    return grown
