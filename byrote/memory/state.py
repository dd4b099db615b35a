"""All that a memory must remember between two forwards, as one layer of a Hugging Face cache.

The layer is appended behind the attention layers. It holds *tails*: for each named field the last L entries of
the current document of each row, [B, L, ...], in buffers of fixed size.

    ids               the last N - 1 canonical ids          (the look-back of the hash)
    position          the position id of the last token     (does the next token continue its document?)
    document          the slot where its document starts    (what attention may see)
    convolution.<l>   the last (kernel - 1) * dilation inputs of the short convolution of layer l

A rollback needs what the tails have forgotten: after `activate_past_recording` the layer keeps every column that it
is given, and `crop(-k)` rebuilds the tails as they were k tokens earlier, back to the moment of activation.

A cache hands a change on to its layers one by one, and this one comes last. So it is asked before the first
(`AllOrNothing`): a change that it refuses leaves the whole cache as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from byrote.memory.sequence import NO_POSITION, Sequence, carry


@dataclass(frozen=True)
class Field:
    """A tail of `length` entries of `shape`, holding `empty` where the document has no token.

    `dtype` None: that of the model.
    """

    length: int
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = torch.int64
    empty: float = 0


class AllOrNothing:
    """What stands in for a method of a cache with a memory layer: the layer may refuse before any is changed.

    It holds the layers and not the cache, which would keep itself alive.
    """

    def __init__(self, layers: list[Any], name: str) -> None:
        self.layers, self.name = layers, name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        (argument,) = (*args, *kwargs.values())
        if self.name == "crop" and argument > 0:  # a new length
            argument = min(0, argument - int(self.layers[0].get_seq_length()))
        state = self.layers[-1]
        if self.name == "crop":
            state.check_crop(argument)
        else:
            state.check_rows(argument)
        for layer in self.layers:
            getattr(layer, self.name)(argument)


PLACE_FIELDS = {"position": Field(1, empty=NO_POSITION), "document": Field(1)}


@dataclass
class Record:
    """A tail as it was when recording began, and every column since."""

    base: Tensor
    columns: list[Tensor] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)
    starts: list[Tensor] = field(default_factory=list)


class MemoryState(CacheLayerMixin):
    """The decode state of one model's memory. `fields` names the tails that the model needs."""

    is_croppable = True
    # A static cache stays one with this layer in it. If it did not, transformers would drop the mask of a one-token
    # decode, and the token would see slots that nothing was written to.
    is_compileable = True
    supports_early_init = False

    def __init__(self, fields: Mapping[str, Field]) -> None:
        super().__init__()
        self.fields = {**PLACE_FIELDS, **fields}
        self.tails: dict[str, Tensor] = {}
        self.records: dict[str, Record] = {}
        self.record_past = False

    @classmethod
    def attach(cls, cache: Cache, num_attention_layers: int, fields: Mapping[str, Field]) -> MemoryState:
        """The memory layer of `cache`, appended behind its attention layers if it is not there yet."""
        if cache.layers and isinstance(cache.layers[-1], cls):
            found = cache.layers[-1]
            if len(cache.layers) != num_attention_layers + 1 or found.fields != {**PLACE_FIELDS, **fields}:
                raise ValueError("past_key_values holds the memory state of another model: start from an empty cache")
            return found
        if int(cache.get_seq_length()) > 0:
            raise ValueError(
                "past_key_values holds tokens but no memory state: it was filled by another model, or by prefix "
                "tuning, which has no tokens to look up; start from an empty cache, or adapt by LoRA"
            )
        while len(cache.layers) < num_attention_layers and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        if len(cache.layers) != num_attention_layers:
            raise ValueError(
                f"past_key_values has {len(cache.layers)} layers, the model {num_attention_layers} with attention: "
                "make the cache with this model's config"
            )
        state = cls(fields)
        cache.layers.append(state)
        for name in ("crop", "reorder_cache", "batch_select_indices"):
            setattr(cache, name, AllOrNothing(cache.layers, name))
        return state

    def begin(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make empty tails for `batch_size` rows, unless some have moved already."""
        if not self.is_initialized:
            for name, spec in self.fields.items():
                shape = (batch_size, spec.length, *spec.shape)
                value = int(spec.empty) if spec.dtype == torch.int64 else spec.empty
                self.tails[name] = torch.full(shape, value, dtype=spec.dtype or dtype, device=device)
        rows = self.tails["position"].shape[0]
        if rows != batch_size:
            raise ValueError(
                f"past_key_values holds {rows} rows, input_ids {batch_size}: select or repeat the cache first"
            )

    def advance(self, name: str, columns: Tensor, sequence: Sequence) -> None:
        """Let the tail `name` move over the columns [B, T, ...] of the new tokens."""
        self.is_initialized = True
        buffer = self.tails[name]
        # A backward may need the old tail, or it may not be written in this mode.
        writable = not torch.is_grad_enabled() and not buffer.requires_grad
        writable &= buffer.is_inference() == torch.is_inference_mode_enabled()
        if sequence.goes_on and writable and not self.record_past and buffer.shape[1]:
            self.records.clear()
            columns = columns.to(buffer.dtype)
            buffer.copy_(columns if buffer.shape[1] == 1 else torch.cat([buffer[:, 1:], columns], dim=1))
            return
        tail = carry(buffer, columns, sequence.alive, sequence.starts, self.fields[name].empty)
        if self.record_past:
            record = self.records.setdefault(name, Record(buffer.clone()))
            record.columns.append(columns)
            record.alive.append(sequence.alive)
            record.starts.append(sequence.starts)
            self.tails[name] = tail
            return
        self.records.clear()
        if writable:
            buffer.copy_(tail)
        else:
            self.tails[name] = tail

    def activate_past_recording(self) -> None:
        self.record_past = True

    @property
    def recorded(self) -> int:
        """Tokens that can be taken back."""
        return sum(column.shape[1] for column in self.records["position"].columns) if self.records else 0

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse a crop that is not possible; nothing is changed."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes zero or a negative count of tokens to remove, got {tokens_to_remove}; the cache as a "
                "whole takes a new length too"
            )
        if self.is_initialized and self.recorded < -tokens_to_remove:
            raise RuntimeError(
                f"cannot take back {-tokens_to_remove} tokens, {self.recorded} are recorded: "
                "call cache.activate_past_recording() before the tokens that may be rolled back"
            )

    def check_rows(self, rows: Tensor) -> None:
        """Refuse rows that are not there; nothing is changed. Those on a GPU are not looked at, which would wait."""
        if self.is_initialized and torch.as_tensor(rows).device.type == "cpu":
            _ = torch.arange(len(self.tails["position"]))[rows]

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        recorded = self.recorded
        for name, record in self.records.items():
            columns, alive, starts = (
                torch.cat(parts, dim=1)[:, : recorded + tokens_to_remove]
                for parts in (record.columns, record.alive, record.starts)
            )
            record.columns, record.alive, record.starts = [columns], [alive], [starts]
            self.tails[name] = record.base.clone()
            if columns.shape[1]:
                self.tails[name] = carry(record.base, columns, alive, starts, self.fields[name].empty)

    def reset(self) -> None:
        self.tails, self.records, self.is_initialized = {}, {}, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices, ...])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tails = {name: change(tail) for name, tail in self.tails.items()}
        for record in self.records.values():
            record.base = change(record.base)
            for parts in (record.columns, record.alive, record.starts):
                parts[:] = [change(part) for part in parts]

    # The rest of the cache contract speaks of keys and values; this layer has none and counts no slots.

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the memory layer of a cache holds no keys: see MemoryState.begin")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("the memory layer of a cache holds no keys: see MemoryState.advance")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1
