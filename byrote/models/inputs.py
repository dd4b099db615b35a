"""What a forward is given: refused while nothing is changed yet, then placed, its rows on the way, embedded.

input_ids, labels [B, T]; attention_mask [B, past + T]; position_ids [B, T] or [1, T];
inputs_embeds [B, T, d]. Further arguments, and other ways to say where documents begin: byrote.models.arguments.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from byrote.address.hashing import check_known
from byrote.memory import MemoryStack, MemoryState, Sequence, Ticket
from byrote.memory.sequence import NO_POSITION, stepping
from byrote.models import arguments
from byrote.models.configuration import MemoryConfig
from byrote.nn.mla import Cache as AttentionCache
from byrote.nn.mtp import shift

# Ids decide which rows are read and what is refused: torch.compile begins its graphs behind that.
outside = torch.compiler.disable(
    reason="byrote reads token ids and rows of tables outside of compiled graphs: compile without fullgraph=True"
)


class Entered(NamedTuple):
    """x [B, T, d], the embeddings; mask [B, 1, T, S], as `Inputs.place` gives it; tickets of the memories, by layer."""

    x: Tensor
    sequence: Sequence
    mask: Tensor | None
    tickets: dict[int, Ticket]


@dataclass(frozen=True)
class Inputs:
    """What Hugging Face hands a model, checked: ids, mask, position ids, and a cache with `past` slots taken.

    `begins` bool [B, T]: where documents begin, in place of position ids.
    """

    config: MemoryConfig
    ids: Tensor
    mask: Tensor | None
    position_ids: Tensor | None
    cache: Cache | None
    past: int | Tensor
    embeds: Tensor | None
    begins: Tensor | None

    @classmethod
    @outside
    def of(
        cls,
        config: MemoryConfig,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        inputs_embeds: Tensor | None,
        further: dict[str, Any],
    ) -> Inputs:
        """ValueError unless `input_ids` are ids and the rest has their shape. Unknown ids are refused by `enter`."""
        _check_run()
        if input_ids is None:
            input_ids = _stand_ins(inputs_embeds, config)
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be integers [B, T], got {input_ids.dtype} {list(input_ids.shape)}")
        if not input_ids.numel():
            raise ValueError(f"input_ids is {list(input_ids.shape)}: give at least one token")
        (batch, steps), past = input_ids.shape, _length(cache)
        _check_shape("inputs_embeds", inputs_embeds, [batch, steps, config.hidden_size])
        if attention_mask is not None:
            arguments.check_mask(attention_mask, batch, int(past) + steps)
        if position_ids is not None:
            if list(position_ids.shape) != [1, steps]:
                _check_shape("position_ids", position_ids, [batch, steps])
            if position_ids.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"position_ids must be integers, got {position_ids.dtype}")
        begins = arguments.begins(further, input_ids, int(past))
        if attention_mask is not None and begins is None and (steps > 1 or stepping(attention_mask)):
            begins = arguments.numbered(attention_mask, steps)
        if begins is not None and position_ids is not None:
            alive = torch.ones_like(begins) if attention_mask is None else attention_mask[:, -steps:].bool()
            arguments.check_agree(begins, position_ids.expand(batch, -1), alive)
            position_ids = None
        return cls(config, input_ids, attention_mask, position_ids, cache, past, inputs_embeds, begins)

    @outside
    def enter(self, embed_tokens: nn.Module, memories: MemoryStack | None, state: MemoryState | None) -> Entered:
        """Place the tokens, send for their rows, embed them, and let the decode state know them."""
        sequence, mask = self.place(state)
        tickets: dict[int, Ticket] = {}
        if memories is None:
            check_known(self.ids, self.config.vocab_size, sequence.alive)
        else:
            tickets = memories(self.ids, sequence, state)
        self._warn_of_length(sequence)
        # From here on nothing is refused. Only what stands under padding may still be no id.
        x = self.embeds
        if x is None:
            x = embed_tokens(self.ids.clamp(0, self.config.vocab_size - 1))
        if state is not None:
            state.advance("position", sequence.position_ids, sequence)
            state.advance("document", sequence.document, sequence)
        return Entered(x, sequence, mask, tickets)

    def _warn_of_length(self, sequence: Sequence) -> None:
        """Of packed rows the positions tell."""
        longest = self.config.max_position_embeddings
        if self._known > longest and int(sequence.position_ids.max()) >= longest:
            warnings.warn(
                f"tokens stand beyond max_position_embeddings={longest}: a model that was trained no further predicts "
                "them badly. Give shorter texts, or train on with a larger number (an EngramConfig has `yarn` too)",
                stacklevel=4,
            )

    def place(self, state: MemoryState | None) -> tuple[Sequence, Tensor | None]:
        """The sequence of the new tokens, and the attention mask [B, 1, T, S].

        None for a mask: plain causal over new tokens that are all there is, or a single one that sees all of the cache.
        """
        batch, steps = self.ids.shape
        if steps == 1 and state is not None and self.begins is None and stepping(self.ids):
            return self._step(state)
        key_alive = self._key_alive(batch, self.ids.device)
        last_position = self.ids.new_full((batch, 1), NO_POSITION)
        last_document = torch.zeros_like(last_position)
        if state is not None:
            last_position, last_document = state.tails["position"], state.tails["document"]
        position_ids = self.position_ids
        if position_ids is None:  # the document goes on, but where another begins
            alive = key_alive[:, -steps:]
            count = alive.cumsum(dim=1)
            position_ids = last_position.clamp_min(-1) + count
            if self.begins is not None:
                first = torch.where(self.begins, count + ~alive, 0).cummax(dim=1).values
                position_ids = torch.where(first > 0, count - first, position_ids)
            position_ids = position_ids.clamp_min(0)
        position_ids = position_ids.expand(batch, -1)
        sequence = Sequence.place(position_ids, key_alive[:, -steps:], self.past, last_position, last_document)
        if self.mask is None and self.position_ids is None and self.begins is None and self.cache is None:
            return sequence, None
        return sequence, self._visible(sequence, key_alive, self.past)

    def _step(self, state: MemoryState) -> tuple[Sequence, Tensor | None]:
        """`place` of one token a row behind a past, on a CPU."""
        last_position, last_document = state.tails["position"], state.tails["document"]
        rows = len(last_position)
        alive = torch.ones(rows, 1, dtype=torch.bool) if self.mask is None else self.mask[:, -1:].bool()
        position_ids = None if self.position_ids is None else self.position_ids.expand(rows, -1)
        sequence = Sequence.step(position_ids, alive, int(self.past), last_position, last_document)
        seen = self.mask is None or bool(self.mask.all())
        if seen and not sequence.document.numpy().any() and self._slots == self._known:
            return sequence, None
        return sequence, self._visible(sequence, self._key_alive(rows, alive.device), int(self.past))

    @property
    def _known(self) -> int:
        """Slots with the new tokens in them."""
        return int(self.past) + self.ids.shape[1]

    @property
    def _slots(self) -> int:
        return self._known if self.cache is None else max(self._known, self.cache.get_max_length(0))

    def _key_alive(self, rows: int, device: torch.device) -> Tensor:
        if self.mask is None:
            return torch.ones(rows, self._known, dtype=torch.bool, device=device)
        return self.mask.bool()

    def _visible(self, sequence: Sequence, key_alive: Tensor, past: int | Tensor) -> Tensor:
        return sequence.mask(past, nn.functional.pad(key_alive, (0, self._slots - self._known)))


def _check_run() -> None:
    """ValueError under a tool that keeps what one run did as a program."""
    tool = "torch.jit.trace" if torch.jit.is_tracing() else "torch.export" if torch.compiler.is_exporting() else None
    if tool is not None:
        raise ValueError(
            f"{tool} keeps the operations of one run, and which rows, experts and concepts a token takes follows from "
            "its ids (tables are no part of such a program, either): share the folder of save_pretrained, and make "
            "the model faster with torch.compile(model)"
        )


def attention_cache(cache: Cache | None, layer: int) -> AttentionCache | None:
    """What the attention of a layer keeps its keys and values with."""
    if cache is None:
        return None
    return lambda key, value: cache.update(key, value, layer)


def targets_of(
    labels: Tensor | None, shift_labels: Tensor | None, tokens: Tensor | None, vocab_size: int
) -> Tensor | None:
    """What each token is to predict, int64 [B, T]: `shift_labels`, or else `labels` moved by one; None of None.

    `tokens`: ids [B, T], or embeddings [B, T, d].
    """
    for name, given in (("labels", labels), ("shift_labels", shift_labels)):
        if given is not None and tokens is not None:
            _check_labels(name, given, tokens, vocab_size)
    if shift_labels is not None or labels is None:
        return shift_labels
    return shift(labels, 1, empty=-100)


@outside
def _check_labels(name: str, labels: Tensor, tokens: Tensor, vocab_size: int) -> None:
    _check_shape(name, labels, list(tokens.shape[:2]))
    if labels.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, the ids to be predicted, got {labels.dtype}")
    unknown = (labels != -100) & ((labels < 0) | (labels >= vocab_size))
    if bool(unknown.any()):
        row, position = (int(index) for index in unknown.nonzero()[0])
        raise ValueError(
            f"{name}[{row}, {position}] is {int(labels[row, position])}; "
            f"give ids below vocab_size={vocab_size}, and -100 where nothing is predicted"
        )


def _stand_ins(inputs_embeds: Tensor | None, config: MemoryConfig) -> Tensor:
    """Ids [B, T] for embeddings that come without any, where no memory reads them."""
    if inputs_embeds is None:
        raise ValueError("input_ids is missing: give token ids [B, T]")
    if config.memory_layers:
        raise ValueError(
            "input_ids is missing: a memory is addressed by token ids; pass them beside inputs_embeds. What has "
            "no ids, as the virtual tokens of prompt tuning, cannot be looked up: adapt such a model by LoRA"
        )
    return torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)


def target_counts(targets: Tensor, num_items_in_batch: Tensor | int | None) -> tuple[Tensor, Tensor | int]:
    """(tokens to predict, of each row; by how many the loss is divided, never by 0: a loss over nothing is 0)"""
    items = (targets != -100).sum(dim=1)
    return items, items.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch


def _length(cache: Cache | None) -> int | Tensor:
    """Slots taken; a static cache counts in a tensor that it changes in place."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    return length.clone() if isinstance(length, Tensor) else length


def _check_shape(name: str, tensor: Tensor | None, shape: list[int], meaning: str = "") -> None:
    if tensor is not None and list(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}{meaning}, got {list(tensor.shape)}")
