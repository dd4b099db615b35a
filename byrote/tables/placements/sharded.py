"""ShardedTable: a table whose rows are spread over the ranks of a process group, each row in the RAM of its owner.

    read     unique ids -> their owners (all-to-all) -> rows -> back (all-to-all) -> every place that asked
    step     unique (row, gradient) pairs -> their owners, which average and apply them: `exchange`, `update`
    write    all ranks are given the same rows, as with replicated tables; each keeps those that it owns

A rank holds rows and rule state of its share and nothing of the others'. Who owns a row: `ranks.py`.

`read` and `read_state` are collective, and so are `save` and `save_state`: all ranks call them in the same order, with
zero ids too. A model does so by itself, as its layers read in order, and again where gradient checkpointing computes a
block anew in backward. What makes ranks run unlike numbers of forwards hangs: give each as many batches (a rank that
has no more repeats one, as `byrote.train.evaluate` does), and `generate(synced_gpus=True)`. Bad row ids on one rank
raise on all.

Files are those of one process, byte by byte: rank 0 writes, and the others send it their rows a piece at a time, so
that it never holds the table. `open` and `load_state` take each rank's share from the mapped file, whatever number of
ranks wrote it; every rank must see the file.

A `CachedTable` over this one would read it on the ranks that miss and hang: caches go to the parts.
With the codec bf16-stochastic each rank draws its own chance, so that other numbers of ranks round otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byrote.tables.codecs import CODECS, check_finite
from byrote.tables.files.format import header_of, load_state_file, stream
from byrote.tables.placements.copied import CopiedTable
from byrote.tables.placements.logged import CHUNK_BYTES
from byrote.tables.placements.ram import RamTable
from byrote.tables.placements.ranks import Ranks
from byrote.tables.records import sum_rows
from byrote.tables.rules import RowRule
from byrote.tables.table import RowState, StateFields, Table, check_row_ids


class ShardedTable(Table):
    """`part`: the rows of this rank, of `num_rows` in all."""

    apart = False
    sharded = settled = True

    def __init__(self, part: RamTable | CopiedTable, num_rows: int, ranks: Ranks) -> None:
        if part.num_rows != ranks.count(num_rows):
            raise ValueError(
                f"rank {ranks.rank} of {ranks.world} owns {ranks.count(num_rows)} of {num_rows} rows, "
                f"got a part of {part.num_rows}: make parts with ShardedTable.split"
            )
        self.part, self.num_rows, self.ranks = part, num_rows, ranks
        self.width, self.digest, self.codec = part.width, part.digest, part.codec

    @classmethod
    def split(cls, table: Table, ranks: Ranks) -> ShardedTable:
        """Each rank's share of a table that all ranks have, with its rule state.

        A table that was not drawn yet is drawn piece by piece, and only the share is kept.
        """
        if not isinstance(table, RamTable):
            raise ValueError(f"a {type(table).__name__} cannot be sharded: open the model with placement='sharded'")
        if table.num_rows < ranks.world:
            raise ValueError(f"a table of {table.num_rows} rows cannot be sharded over {ranks.world} ranks: use fewer")
        return cls(_Part(table, ranks), table.num_rows, ranks)

    @classmethod
    def open(cls, path: Path, *, num_rows: int, width: int, digest: str, ranks: Ranks) -> ShardedTable:
        """This rank's share of the table in `path`; errors as `RamTable.open`."""
        return cls.split(RamTable.open(path, num_rows=num_rows, width=width, digest=digest), ranks)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedTable:
        return ShardedTable(copy.deepcopy(self.part, memo), self.num_rows, self.ranks)

    @property
    def generation(self) -> int:
        return self.part.generation

    @generation.setter
    def generation(self, generation: int) -> None:
        self.part.generation = generation

    @property
    def identity(self) -> int:
        return self.part.identity

    @identity.setter
    def identity(self, identity: int) -> None:
        self.part.identity = identity

    @torch.no_grad()
    def read(self, rows: Tensor) -> Tensor:
        unique, inverse = self._unique(rows.reshape(-1).cpu())
        route = self.ranks.route(unique, self._refusal(rows))
        values = route.back(self.part.read(self.ranks.local(route.there(unique))))
        return values.index_select(0, inverse).view(*rows.shape, self.width).to(rows.device)

    @torch.no_grad()
    def read_state(self, rows: Tensor, fields: StateFields) -> RowState:
        unique, inverse = self._unique(rows.cpu())
        route = self.ranks.route(unique, self._refusal(rows))
        state = self.part.read_state(self.ranks.local(route.there(unique)), fields)
        return {name: route.back(value).index_select(0, inverse).to(rows.device) for name, value in state.items()}

    @torch.no_grad()
    def write(self, rows: Tensor, values: Tensor, state: RowState | None = None) -> None:
        """Not collective; with the same arguments on all ranks, as for a replicated table."""
        check_row_ids(rows, self.num_rows)
        if values.shape != (len(rows), self.width):
            raise ValueError(f"values must be [{len(rows)}, {self.width}], got {list(values.shape)}")
        if lengths := {name: len(value) for name, value in (state or {}).items() if len(value) != len(rows)}:
            raise ValueError(f"rule state must have {len(rows)} entries, one a row, got {lengths}")
        check_finite(values)  # of all rows: no rank writes alone
        mine = self.ranks.owned(rows)
        if state is not None:
            state = {name: value[mine] for name, value in state.items()}
        self.part.write(self.ranks.local(rows[mine]), values[mine], state)

    def commit(self) -> int:
        return self.part.commit()

    def check_rule(self, rule: RowRule) -> None:
        if not rule.alone:
            raise ValueError(
                f"{type(rule).__name__} balances rows with one another, of which a rank has its own only: "
                "train sharded tables with row_rule 'adam' or 'adagrad', not 'sinkhorn'"
            )

    @property
    def own(self) -> Table:
        return self.part

    def read_own(self, rows: Tensor) -> Tensor:
        return self.part.read(self.ranks.local(rows))

    def exchange(self, rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Unique ascending rows [U] and gradients [U, W] of this rank -> of all ranks, those of the rows it owns."""
        rows, gradient = rows.cpu(), gradient.cpu()
        route = self.ranks.route(rows)
        rows, gradient, _ = sum_rows(route.there(rows), route.there(gradient))
        return rows, gradient / self.ranks.world

    def totals(self, *numbers: int) -> list[int]:
        return self.ranks.sum(list(numbers))

    def update(self, rule: RowRule, rows: Tensor, gradient: Tensor, rate: float) -> None:
        """Not collective: of rows that this rank owns."""
        self.part.update(rule, self.ranks.local(rows), gradient, rate)

    def place(self, table: Any) -> Table:
        return ShardedTable.split(table, self.ranks)

    def save(self, path: Path) -> None:
        codec, world = CODECS[self.codec], self.ranks.world
        step = max(1, CHUNK_BYTES // codec.record_bytes(self.width) // world)  # rows of each rank

        def chunks() -> Iterator[Tensor]:
            for at in range(0, -(-self.num_rows // world), step):
                parts = self.ranks.to_first(self.part.records(at, at + step))
                whole = torch.empty(sum(map(len, parts)), codec.record_bytes(self.width), dtype=torch.uint8)
                for rank, part in enumerate(parts):
                    whole[rank::world] = part
                yield whole.view(codec.dtype)

        shape = (self.num_rows, codec.record_bytes(self.width) // codec.dtype.itemsize)
        self._write_file(path, {"rows": (codec.dtype, shape, chunks)})

    def save_state(self, path: Path) -> None:
        """Rule state of the touched rows of all ranks, by ascending row id."""
        local = self.part.touched()
        ids = self.ranks.ids(local)
        fields: StateFields = max(self.ranks.share(dict(self.part.fields)), key=len)  # a rank may have met no row yet
        step = max(1, CHUNK_BYTES // (8 + sum(4 * torch.Size(shape).numel() for shape in fields.values())))
        # Pieces of equal length, told by the row that each begins with.
        first = torch.cat(self.ranks.to_first(ids)).sort().values
        begins, total = self.ranks.share((first[::step].tolist(), len(first)))[0]
        pieces = torch.tensor_split(local, torch.searchsorted(ids, torch.tensor(begins, dtype=torch.int64))[1:])

        def merged(read: Callable[[Tensor], Tensor]) -> Callable[[], Iterator[Tensor]]:
            def chunks() -> Iterator[Tensor]:
                for piece in pieces if total else ():
                    order = torch.cat(self.ranks.to_first(self.ranks.ids(piece))).argsort()
                    yield torch.cat(self.ranks.to_first(read(piece)))[order]

            return chunks

        def reader(name: str) -> Callable[[Tensor], Tensor]:
            return lambda piece: self.part.read_state(piece, fields)[name]

        arrays: dict[str, Any] = {"rows": (torch.int64, (total,), merged(self.ranks.ids))}
        for name in sorted(fields):
            arrays[name] = (torch.float32, (total, *fields[name]), merged(reader(name)))
        self._write_file(path, arrays)

    def load_state(self, path: Path) -> None:
        rows, state = load_state_file(path, self)
        mine = self.ranks.owned(rows)
        self.part.replace_state(self.ranks.local(rows[mine]), {name: value[mine] for name, value in state.items()})

    def stats(self) -> dict[str, Any]:
        """Of the table, with `bytes`, `rows_touched` and `state_bytes` of this rank's part."""
        return self.part.stats() | {"num_rows": self.num_rows, "ranks": self.ranks.world, "rank": self.ranks.rank}

    def _unique(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if rows.dtype != torch.int64:  # is refused, by all ranks together
            rows = rows.long()
        unique, inverse = torch.unique(rows, return_inverse=True)
        return unique, inverse

    def _refusal(self, rows: Tensor) -> str:
        try:
            check_row_ids(rows, self.num_rows)
        except ValueError as error:
            return str(error)
        return ""

    def _write_file(self, path: Path, arrays: dict[str, Any]) -> None:
        if self.ranks.rank == 0:
            stream(path, arrays, header_of(self))
        else:
            for _, _, chunks in arrays.values():
                for _ in chunks():
                    pass
        self.ranks.wait()  # the file is there


class _Part(RamTable):
    """The rows of one rank out of a whole table, taken when they are first needed."""

    def __init__(self, whole: RamTable, ranks: Ranks) -> None:
        super().__init__(ranks.count(whole.num_rows), whole.width, digest=whole.digest, codec=whole.codec)
        self.generation, self.identity = whole.generation, whole.identity
        self._ranks = ranks
        self._whole: RamTable | None = whole
        touched = whole.touched()
        mine = touched[ranks.owned(touched)]
        if len(touched):
            self.replace_state(ranks.local(mine), whole.read_state(mine, whole.fields))
        if whole.drawn:
            _ = self.rows
            self._whole = None  # others may still hold it; this rank keeps its share

    def pieces(self) -> Iterator[Tensor]:
        if self.drawn or self._whole is None:
            yield from super().pieces()
            return
        at, world = 0, self._ranks.world
        for piece in self._whole.pieces():
            yield piece[(self._ranks.rank - at) % world :: world]
            at += len(piece)
