"""One table of one model: what belongs into a `state_dict`, and whether backbone and table belong together.

anchor [1]        the parameter that stands for all rows (`anchor.py`)
generation [1]    how often the table was changed when the backbone was saved
identity [1]      by which training (`identity.py`)
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from byrote.memory.anchor import Anchor, loaded, plain
from byrote.memory.identity import next_identity
from byrote.memory.lookup import Lookup, Ticket
from byrote.memory.mixing import Mixing, settle
from byrote.tables.table import UNKNOWN, Table

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


def _forget_generation(memory: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """An anchor comes without the generation of its table: a file of what was trained, to which rows belong.

    Where rows move, in a training, weights may go to and fro without them.
    """
    assert isinstance(memory, Memory)
    if type(state.get(f"{prefix}anchor")) not in (Tensor, nn.Parameter) or f"{prefix}generation" in state:
        return
    if not memory.moved:
        memory.generation.fill_(NO_GENERATION)
