"""OverlayTable: few rows of one's own laid over any other table, which stays as it is.

    read(row) = the row of `top` if it holds one, else the row of `base`

`top` is a `SparseRows`: ids and values in RAM, and a small file that travels without its base. The overlay is for
reading unless it is made `writable`; then writes go to `top`, never to `base`, and rows that were never written stay
the base's. Rule state is the overlay's own: a row of the base begins its training here without any.

A `LoggedTable` reads in the same way, for another purpose. Its log is the memory of one run: on disk, with a durable
generation for each checkpoint, rule state beside every row, in a format of its own and bound to one base file. An
overlay is an object that is made, handed on and laid over a table of the same address spec: it knows no generations
and is saved whole.

Its `generation` begins as the base's, so that a model takes an overlay in place of its table. `save` writes the merged
table, in the base's codec; `top.save` writes the overlay alone.

Over a `ShardedTable`, `read` reads the base also where the overlay holds every row, because all ranks must.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.tables.codecs import CODECS, chance
from byrote.tables.files.format import header_of, load_state_file, save_state_file, stream
from byrote.tables.placements.file import CHUNK_BYTES
from byrote.tables.placements.sparse import SparseRows, grown
from byrote.tables.table import Followers, RowState, StateFields, Table, check_row_ids


class OverlayTable(Table):
    """`top` over `base`; ValueError where they belong to different address specs or shapes."""

    apart = False

    def __init__(self, base: Table, top: SparseRows, *, writable: bool = False) -> None:
        for field in ("digest", "num_rows", "width"):
            if getattr(top, field) != getattr(base, field):
                raise ValueError(
                    f"the overlay has {field} {getattr(top, field)}, the table below {getattr(base, field)}: "
                    "lay it over a table of the address spec and config that it was made for"
                )
        self.base, self.top, self.writable = base, top, writable
        self.num_rows, self.width, self.digest = base.num_rows, base.width, base.digest
        self.generation, self.identity = base.generation, base.identity
        self.codec: str = getattr(base, "codec", None) or base.stats()["codec"]  # of a merged file
        self.followers = Followers()
        self._state: RowState = {}
        self._trained = torch.zeros(0, dtype=torch.bool)  # by place: whether rule state was written

    def __deepcopy__(self, memo: dict[int, Any]) -> OverlayTable:
        made = type(self)(copy.deepcopy(self.base, memo), copy.deepcopy(self.top, memo), writable=self.writable)
        made._take(self, memo)
        return made

    def _take(self, other: OverlayTable, memo: dict[int, Any]) -> None:
        """Generation, identity and rule state of an overlay with the same rows."""
        self.generation, self.identity = other.generation, other.identity
        self._state, self._trained = copy.deepcopy((other._state, other._trained), memo)

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        check_row_ids(rows, self.num_rows)
        flat = rows.reshape(-1).cpu()
        places = self.top.find(flat)
        covered = places >= 0
        if not covered.any():
            return self.base.read(rows)
        values = torch.empty(len(flat), self.width, dtype=torch.float32)
        values[~covered] = self.base.read(flat[~covered])
        values[covered] = self.top.read(places[covered])
        return values.view(*rows.shape, self.width).to(rows.device)

    @torch.no_grad()
    def read_state(self, rows: Tensor, fields: StateFields) -> RowState:
        check_row_ids(rows, self.num_rows)
        self._check_fields(fields)
        places = self.top.find(rows)
        places[places >= len(self._trained)] = -1  # those that came since state was last written
        found = (places >= 0) & self._trained[places] if len(self._trained) else places >= 0
        state = {name: torch.zeros(len(rows), *shape, dtype=torch.float32) for name, shape in fields.items()}
        if found.any():
            for name, value in state.items():
                value[found] = self._state[name][places[found]]
        return {name: value.to(rows.device) for name, value in state.items()}

    @torch.no_grad()
    def write(self, rows: Tensor, values: Tensor, state: RowState | None = None) -> None:
        self._check_writable()
        if state is not None:
            if lengths := {name: len(value) for name, value in state.items() if len(value) != len(rows)}:
                raise ValueError(f"rule state must have {len(rows)} entries, one a row, got {lengths}")
            self._check_fields({name: tuple(value.shape[1:]) for name, value in state.items()})
        self.followers.keep(rows)
        places = self.top.write(rows, values)
        if state is not None:
            self._put_state(places, state)

    def _put_state(self, places: Tensor, state: RowState) -> None:
        for name, value in state.items():
            array = self._state.get(name, torch.zeros(0, *value.shape[1:], dtype=torch.float32))
            self._state[name] = grown(array, len(self.top)).index_copy_(0, places, value.to("cpu", torch.float32))
        self._trained = grown(self._trained, len(self.top)).index_fill_(0, places, True)

    def commit(self) -> int:
        self._check_writable()
        self.generation += 1
        self.top.generation += 1
        return self.generation

    def save(self, path: Path) -> None:
        """The merged table. ValueError where a row of the overlay would change in the base's codec."""
        codec = CODECS[self.codec]
        step = max(1, CHUNK_BYTES // (4 * self.width))
        for ids in self.top.ids().split(step):
            values = self.top.read(self.top.find(ids))
            if not torch.equal(
                codec.decode(codec.encode(values, chance(self.digest, self.generation)), self.width), values
            ):
                raise ValueError(
                    f"{path} would hold codec {self.codec} and change rows of the overlay, which is {self.top.codec}: "
                    f"make the overlay with codec={self.codec!r}, or save it alone with top.save"
                )

        def chunks() -> Iterator[Tensor]:
            for at in range(0, self.num_rows, step):
                yield self.records(at, at + step).view(codec.dtype)

        shape = (self.num_rows, codec.record_bytes(self.width) // codec.dtype.itemsize)
        stream(path, {"rows": (codec.dtype, shape, chunks)}, header_of(self))

    def records(self, begin: int, end: int) -> Tensor:
        """Rows begin to end in the base's codec, bytes [end - begin, B]."""
        values = self.read(torch.arange(begin, min(end, self.num_rows)))
        # What was decoded is encoded without loss, by chance or not.
        return CODECS[self.codec].encode(values, chance(self.digest, self.generation)).view(torch.uint8)

    def save_state(self, path: Path) -> None:
        rows = self.touched()
        save_state_file(path, self, rows, self.read_state(rows, self.fields) if len(rows) else {})

    def load_state(self, path: Path) -> None:
        self.replace_state(*load_state_file(path, self))

    def replace_state(self, rows: Tensor, state: RowState) -> None:
        """Forget all rule state, and take that of rows [U]."""
        self._check_writable()
        self.followers.keep(self.touched())
        self._state, self._trained = {}, torch.zeros(0, dtype=torch.bool)
        if rows.numel():
            self.write(rows, self.read(rows), state)

    def stats(self) -> dict[str, Any]:
        """Those of the base, and how many rows lie over it; `codec` is "mixed" where the two are stored differently."""
        return self.base.stats() | {
            "codec": self.codec if self.top.codec == self.codec else "mixed",
            "generation": self.generation,
            "rows_touched": len(self.touched()),
            "state_bytes": sum(array.nbytes for array in self._state.values()) + self._trained.nbytes,
            "overlay_rows": len(self.top),
            "overlay_bytes": self.top.num_bytes,
        }

    @property
    def fields(self) -> StateFields:
        """Names and shapes of the rule state that is kept."""
        return {name: tuple(array.shape[1:]) for name, array in self._state.items()}

    def touched(self) -> Tensor:
        """Ids of the rows with rule state of their own [U], ascending."""
        ids = self.top.ids()
        return ids[grown(self._trained, len(self.top))[self.top.find(ids)]]

    def _check_writable(self) -> None:
        if not self.writable:
            raise ValueError(
                "this overlay is for reading: freeze the table (memory.anchor.requires_grad = False), or make the "
                "overlay with writable=True to train its rows"
            )

    def _check_fields(self, fields: StateFields) -> None:
        present = dict(self.fields)
        if present and fields and present != {name: tuple(shape) for name, shape in fields.items()}:
            raise ValueError(f"the table keeps rule state {sorted(present)}, the rule asks for {sorted(fields)}")
