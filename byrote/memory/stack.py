"""All memories of one model: addresses once at the top of a forward, one ticket a layer.

    input_ids -> canonical ids -> windows of the last N ids -> row ids of every layer -> tickets

They depend on the token ids alone, so reads can start before the first block runs. The stack is a Module only for
what belongs into a `state_dict`: the vocabulary map, and for each table an anchor and the generation it was saved at.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from byrote.address.hashing import canonical_ids, hash_rows, windows
from byrote.address.spec import DEAD, AddressSpec
from byrote.address.vocabulary import resize
from byrote.memory.anchor import Anchor, loaded, plain
from byrote.memory.identity import next_identity
from byrote.memory.lookup import Lookup, Ticket
from byrote.memory.mixing import Mixing, settle
from byrote.memory.sequence import NO_POSITION, Sequence
from byrote.memory.state import Field, MemoryState
from byrote.tables.placements.open import POINTER, move
from byrote.tables.table import UNKNOWN, Table

UNSET = -1
NO_GENERATION = -1

alive: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()  # by their ids, as they came


class Memory(nn.Module):
    """One table of a model.

    `anchor` [1] is all that autograd, DDP and PEFT see of it: its `requires_grad` freezes the table, its param group
    sets the table's rate. `generation` and `identity` [1] are saved with the backbone and must equal the table's: how
    often it was changed, and by which training. A backbone that was saved without them has NO_GENERATION and UNKNOWN.
    """

    anchor: nn.Parameter
    generation: Tensor
    identity: Tensor

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.register_buffer("generation", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("identity", torch.full((1,), table.identity))
        self.lookup = Lookup(table)
        self.mixing: Mixing | None = None  # what the rows are to become
        self._checked: tuple[int, ...] | None = None
        self.moved = False  # whether rows changed since the table was put here
        self._hooked: weakref.ref[Tensor] | None = None  # the anchor that has our hook
        alive[id(self)] = self
        self.register_load_state_dict_pre_hook(_forget_generation)
        Anchor.tie(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        settle(self)
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        Anchor.tie(made)
        return made

    @property
    def table(self) -> Table:
        Anchor.tie(self)  # a loader puts parameters of its own in place
        settle(self)
        return self.lookup.table

    @table.setter
    def table(self, table: Table) -> None:
        self.lookup, self.mixing, self._checked, self.moved = Lookup(table), None, None, False
        self.identity.fill_(table.identity)
        Anchor.tie(self)

    def ticket(self, rows: Tensor) -> Ticket:
        """A way to the rows [B, T, C]; RuntimeError where the backbone was saved at another generation."""
        if self.generation.is_meta:
            raise ValueError(
                "the buffers of a memory were offloaded, and are looked at without calling it: offload with "
                "offload_buffers=False"
            )
        _ = self.table
        self._check_generation()
        if self.anchor.requires_grad and torch.is_grad_enabled():
            self._hook_anchor()
        return Ticket(rows, plain(self.anchor), self.lookup, self.lookup.begin(rows))

    def _hook_anchor(self) -> None:
        """See to it that the row gradients follow what becomes of the anchor's gradient."""
        anchor = self.anchor
        self.lookup.pending.anchored = anchor.is_leaf  # that of a functional call need not be
        if not anchor.is_leaf or (self._hooked is not None and self._hooked() is anchor):
            return
        memory = weakref.ref(self)

        def claim(anchor: Tensor) -> None:
            if (found := memory()) is not None:
                found.lookup.pending.claim(anchor)

        anchor.register_post_accumulate_grad_hook(claim)
        self._hooked = weakref.ref(anchor)
        alive[id(self)] = self  # once more, for a copy

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        settle(self)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if (name := f"{prefix}anchor") in state_dict:
            state_dict[name] = loaded(state_dict[name], self)
        if f"{prefix}generation" in state_dict:  # older than identities
            state_dict.setdefault(f"{prefix}identity", torch.full((1,), UNKNOWN))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def commit(self, change: int = 0) -> None:
        """Close one step of row updates, here and in the table; `change` tells it from other steps."""
        table = self.lookup.table
        generation = table.commit()
        table.identity = next_identity(table.identity, generation, change)
        self.generation.fill_(generation)
        self.identity.fill_(table.identity)
        self.moved = True

    def forget(self, missing: set[str]) -> None:
        """The backbone was loaded from a file without these of its buffers."""
        if "generation" in missing:
            self.generation.fill_(NO_GENERATION)
        if missing:
            self.identity.fill_(UNKNOWN)

    def difference(self, table: Table) -> str:
        """Why the backbone does not belong to a table; "" if it does, as far as both can tell."""
        generation, identity = int(self.generation), int(self.identity)
        if generation != table.generation:
            return f"the backbone was saved at generation {generation} of its table, the table is at {table.generation}"
        if UNKNOWN in (identity, table.identity) or identity == table.identity:
            return ""
        return (
            f"the backbone and the table are both at generation {generation}, but of different trainings: "
            f"{identity:016x} and {table.identity:016x}"
        )

    def _check_generation(self) -> None:
        # Reading the buffer waits for the device, so it is read again only when somebody may have written it.
        table, saved = self.lookup.table, (self.generation, self.identity)
        stamp = (table.generation, table.identity, *map(id, saved), *(buffer._version for buffer in saved))
        if stamp == self._checked:
            return
        if int(self.generation) == NO_GENERATION:
            raise RuntimeError(
                "the weights were loaded from a checkpoint of trainable parameters alone: it has the anchor of this "
                "table, whose rows were trained then, and no rows. Load them too, from what "
                "model.save_pretrained(folder) wrote: model.load_tables(folder)"
            )
        if difference := self.difference(table):
            raise RuntimeError(
                f"{difference}: a plain load_state_dict does not bring tables back. Load both with "
                "from_pretrained or model.load_tables(folder); the stock Trainer needs byrote.train.TableCallback()"
            )
        self._checked = stamp


class MemoryStack(nn.Module):
    """The memories of the layers in `spec.layers`, by layer id.

    `vocabulary` is the map from raw to canonical ids, int64 [V]; None leaves it to be loaded with the weights.
    `make_table(num_rows, layer_id)` supplies each table.
    """

    vocabulary: Tensor

    def __init__(
        self, spec: AddressSpec, vocabulary: np.ndarray | None, make_table: Callable[[int, int], Table]
    ) -> None:
        super().__init__()
        self.spec = spec
        self._known: np.ndarray | None = None
        self.register_buffer("vocabulary", self.known_vocabulary())
        if vocabulary is not None:
            self.know(vocabulary)
        self.memories = nn.ModuleDict(
            {str(layer.layer_id): Memory(make_table(layer.rows, layer.layer_id)) for layer in spec.layers}
        )
        self.is_checkpoint: Callable[[Path], bool] = nowhere  # of the training that goes on
        self._checked: tuple[int, int] | None = None

    def know(self, vocabulary: np.ndarray) -> None:
        """Take this map, int64 [V]; ValueError unless it is the one that the addresses were made for."""
        self.spec.check_vocabulary(vocabulary)
        self._known = vocabulary
        self.vocabulary = self.known_vocabulary().to(self.vocabulary.device)

    def resize(self, vocab_size: int) -> None:
        """Know so many ids: each new one as a class of its own while the multipliers leave room, then in the last.

        Rows stay where they are. ValueError where tables are in files, which name their vocabulary.
        """
        self._check_vocabulary()
        vocabulary = resize(self.vocabulary.cpu().numpy(), vocab_size, self.spec.most_classes)
        spec = self.spec.resized(vocabulary)
        for _, memory in self.items():
            memory.table.readdress(spec.digest)
        self.spec = spec
        self.know(vocabulary)

    def known_vocabulary(self) -> Tensor:
        """The map that this stack was made with, int64 [V]; UNSET where it is to come with the weights."""
        if self._known is None:
            return torch.full((self.spec.vocab_size,), UNSET)
        return torch.from_numpy(self._known.copy())

    def items(self) -> list[tuple[int, Memory]]:
        """(layer id, memory), in the order of the spec."""
        return [(int(name), memory) for name, memory in self.memories.items()]  # type: ignore[misc]

    def fields(self) -> dict[str, Field]:
        """What the addresses need of a decode state."""
        return {"ids": Field(self.spec.max_order - 1, empty=DEAD)}

    @torch.compiler.disable  # reads start before a compiled region
    def forward(self, input_ids: Tensor, sequence: Sequence, state: MemoryState | None) -> dict[int, Ticket]:
        """Tickets by layer id for token ids [B, T]; moves the look-back in `state` on."""
        ids, rows = self._addresses(input_ids, sequence, None if state is None else state.tails["ids"])
        tickets = {layer_id: self.memories[str(layer_id)].ticket(its_rows) for layer_id, its_rows in rows}  # type: ignore[operator]
        if state is not None:
            state.advance("ids", ids, sequence)
        return tickets

    @torch.no_grad()
    def warm(self, input_ids: Tensor, position_ids: Tensor) -> None:
        """Bring the rows of packed token ids [B, T] into memory, where reading them would wait for a device.

        On any thread, at any time: it changes nothing.
        """
        input_ids, position_ids = (x.to(self.vocabulary.device) for x in (input_ids, position_ids))
        first, alive = torch.zeros_like(input_ids[:, :1]), torch.ones_like(input_ids, dtype=torch.bool)
        sequence = Sequence.place(position_ids, alive, 0, first + NO_POSITION, first)
        for layer_id, rows in self._addresses(input_ids, sequence, None)[1]:
            self.memories[str(layer_id)].lookup.warm(rows)  # type: ignore[union-attr, operator]

    def _addresses(
        self, input_ids: Tensor, sequence: Sequence, tail: Tensor | None
    ) -> tuple[Tensor, Iterator[tuple[int, Tensor]]]:
        """Canonical ids [B, T], and of each layer its id and row ids [B, T, C], one after the other."""
        self._check_vocabulary()
        ids = canonical_ids(self.vocabulary, input_ids, sequence.alive)
        if tail is None:
            tail = ids.new_full((ids.shape[0], self.spec.max_order - 1), DEAD)
        window = windows(ids, sequence.starts, tail, self.spec.max_order)
        return ids, ((layer.layer_id, hash_rows(window, layer, self.spec.pad_id)) for layer in self.spec.layers)

    def move(self, placement: str, device: torch.device | str | None = None) -> None:
        """Bring every table, with the state of its rows, from RAM to another placement; "device" to `device`.

        For "sharded" all ranks of the process group call it.
        """
        memories = [memory for _, memory in self.items()]
        for memory, table in zip(memories, move([m.table for m in memories], placement, device), strict=True):
            memory.table = table

    @property
    def sharded(self) -> bool:
        return any(memory.table.sharded for _, memory in self.items())

    def read_times(self) -> tuple[float, float]:
        """Seconds that reads of all tables took, and for how many of them a forward stood still."""
        times = [memory.lookup.times for _, memory in self.items()]
        return sum(each.read for each in times), sum(each.waited for each in times)

    def drop_pending(self) -> None:
        for _, memory in self.items():
            memory.lookup.pending.drop()

    def table_path(self, folder: Path, layer_id: int) -> Path:
        return folder / f"table-{layer_id}.safetensors"

    def save_tables(self, folder: Path) -> None:
        """Write every table into `folder`. If that `is_checkpoint`, the state of its rows too; of a table whose changed
        rows are in a log, a pointer to both.
        """
        checkpoint = self.is_checkpoint(folder)
        for layer_id, memory in self.items():
            path = self.table_path(folder, layer_id)
            if checkpoint and memory.table.checkpoint(path.with_suffix(POINTER)):
                continue
            memory.table.save(path)
            if checkpoint:
                memory.table.save_state(_row_state_path(folder, layer_id))

    def save_row_state(self, folder: Path) -> None:
        """Write the rule state of every table into `folder`."""
        for layer_id, memory in self.items():
            memory.table.save_state(_row_state_path(folder, layer_id))

    def load_row_state(self, folder: Path) -> None:
        """Read back what `save_row_state` wrote, for tables of the same generation."""
        for layer_id, memory in self.items():
            memory.table.load_state(_row_state_path(folder, layer_id))

    def _check_vocabulary(self) -> None:
        stamp = (id(self.vocabulary), self.vocabulary._version)
        if stamp == self._checked:
            return
        try:
            self.spec.check_vocabulary(self.vocabulary.cpu().numpy())
        except ValueError as error:
            unset = bool((self.vocabulary == UNSET).any())
            raise RuntimeError(
                f"{'the vocabulary map is not set' if unset else error}. Load the weights, or build the model with the "
                "map of its tokenizer (vocabulary=...)"
            ) from None
        self._checked = stamp


def _forget_generation(memory: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """An anchor comes without the generation of its table: a file of what was trained, to which rows belong.

    Where rows move, in a training, weights may go to and fro without them.
    """
    assert isinstance(memory, Memory)
    if type(state.get(f"{prefix}anchor")) not in (Tensor, nn.Parameter) or f"{prefix}generation" in state:
        return
    if not memory.moved:
        memory.generation.fill_(NO_GENERATION)


def nowhere(folder: Path) -> bool:
    return False


def _row_state_path(folder: Path, layer_id: int) -> Path:
    return folder / f"row-state-{layer_id}.safetensors"
