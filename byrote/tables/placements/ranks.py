"""Which rank owns a row, and how ranks hand each other what belongs to them.

    owner(row) = row mod world            place at its owner = row div world

Rows are interleaved and not cut into blocks, for balance. A table holds the columns of its orders and heads one after
the other, so blocks would give a rank whole heads, and the hot rows of a column with them. Within a column a hash has
spread the n-grams already; interleaved, every rank owns an equal share of each column to within one row. N-grams are
Zipfian, but a rank asks for a row once a batch however often it occurs, so that the head of the distribution counts
`world` times at most and the load is that of the distinct rows (`tests/tables/test_sharded.py` measures it).

Everything here but the arithmetic is collective: all ranks of the group call it, in the same order, each with what it
has, be it nothing. The group is one of its own over gloo: its traffic is in host memory, and never in between that of
DDP, whose order follows the gradients. It must not be used by two threads at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from byrote.tables.records import sum_rows

REFUSED = -1


class Ranks:
    """The ranks of the process group. All of them make it at the same time."""

    def __init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "sharded tables need a process group: start with torchrun --nproc-per-node=N, or call "
                "torch.distributed.init_process_group first; in one process placement='host' does the same"
            )
        self.group: Any = dist.new_group(backend="gloo")
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)

    def owned(self, rows: Tensor) -> Tensor:
        """Bool [U]: which of the rows [U] belong to this rank."""
        return rows % self.world == self.rank

    def local(self, rows: Tensor) -> Tensor:
        """Where rows lie at their owner."""
        return rows // self.world

    def ids(self, local: Tensor) -> Tensor:
        """The rows that lie at these places here."""
        return local * self.world + self.rank

    def count(self, num_rows: int) -> int:
        """How many of `num_rows` this rank owns."""
        return (num_rows - self.rank + self.world - 1) // self.world

    def exchange(self, tensor: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
        """Send the first counts[0] entries of `tensor` to rank 0, the next counts[1] to rank 1, and so on.

        What came, in the order of the ranks, and how many entries came from each.
        """
        came = self._counts(counts)
        return self._send(tensor, counts, came), came

    def to_first(self, tensor: Tensor) -> list[Tensor]:
        """At rank 0, the tensors of all ranks; elsewhere empty ones."""
        came, counts = self.exchange(tensor, [len(tensor)] + [0] * (self.world - 1))
        return list(came.split(counts))

    def sum(self, numbers: list[int]) -> list[int]:
        """Over the ranks."""
        total = torch.tensor(numbers)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def share(self, value: Any) -> list[Any]:
        """The small Python values of all ranks."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def wait(self) -> None:
        dist.barrier(group=self.group)

    def route(self, rows: Tensor, error: str = "") -> Route:
        """The way of unique ascending rows [U] to their owners. With an `error` on any rank, all ranks raise."""
        owners = rows % self.world
        counts = [REFUSED] * self.world if error else torch.bincount(owners, minlength=self.world).tolist()
        came = self._counts(counts)
        if error:
            raise ValueError(error)
        if REFUSED in came:
            raise ValueError(f"rank {came.index(REFUSED)} asked for rows that are not there: see its own error")
        return Route(self, torch.argsort(owners, stable=True), counts, came)

    def _counts(self, counts: list[int]) -> list[int]:
        came = torch.empty(self.world, dtype=torch.int64)
        dist.all_to_all_single(came, torch.tensor(counts), group=self.group)
        return came.tolist()

    def _send(self, tensor: Tensor, counts: list[int], came: list[int]) -> Tensor:
        received = tensor.new_empty(sum(came), *tensor.shape[1:])
        dist.all_to_all_single(received, tensor.contiguous(), came, counts, group=self.group)
        return received


@dataclass(frozen=True, eq=False)
class Route:
    """There and back, for entries that go with rows: U of this rank, of which each owner gets its own."""

    ranks: Ranks
    order: Tensor  # of the rows [U], by owner
    counts: list[int]  # for each rank
    came: list[int]  # from each rank

    def there(self, entries: Tensor) -> Tensor:
        """Send entries [U, ...] to the owners; at an owner, what came, by rank and in the order of its rows."""
        return self.ranks._send(entries.index_select(0, self.order), self.counts, self.came)

    def back(self, answers: Tensor) -> Tensor:
        """Send what answers the entries that came; the answers [U, ...] in the order of one's own rows."""
        received = self.ranks._send(answers, self.came, self.counts)
        return torch.empty_like(received).index_copy_(0, self.order, received)


def mean_over_ranks(rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """rows int64 [U] and gradient float32 [U, W] of this rank -> those of all ranks, averaged over the ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, gradient
    world = dist.get_world_size()
    size = torch.tensor([rows.numel()], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    longest = max(int(size) for size in sizes)
    all_rows = _gather(rows, longest)
    all_gradients = _gather(gradient, longest)
    rows = torch.cat([part[: int(size)] for part, size in zip(all_rows, sizes, strict=True)])
    gradient = torch.cat([part[: int(size)] for part, size in zip(all_gradients, sizes, strict=True)])
    rows, gradient, _ = sum_rows(rows, gradient)
    return rows, gradient / world


def _gather(tensor: Tensor, longest: int) -> list[Tensor]:
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    return parts
