"""All memories of one model: addresses once at the top of a forward, one ticket a layer.

    input_ids -> canonical ids -> windows of the last N ids -> row ids of every layer -> tickets

They depend on the token ids alone, so reads can start before the first block runs. The stack is a Module only for
what belongs into a `state_dict`: the vocabulary map, and for each table an anchor and the generation it was saved at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from byrote.address.hashing import canonical_ids, hash_rows, windows
from byrote.address.spec import DEAD, AddressSpec
from byrote.address.vocabulary import resize
from byrote.memory.lookup import Ticket
from byrote.memory.memory import Memory
from byrote.memory.sequence import NO_POSITION, Sequence
from byrote.memory.state import Field, MemoryState
from byrote.tables.placements.open import POINTER, move
from byrote.tables.table import Table

UNSET = -1


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


def nowhere(folder: Path) -> bool:
    return False


def _row_state_path(folder: Path, layer_id: int) -> Path:
    return folder / f"row-state-{layer_id}.safetensors"
