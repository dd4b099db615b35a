"""Row gradients between ranks: what DDP's all-reduce is for dense gradients.

DDP and FSDP see only the anchors. Each rank brings its unique (row, gradient) pairs.

    replicated tables    all-gather: all ranks get the same sorted rows and the mean over ranks, and apply it alike
    sharded tables       all-to-all: the owner of a row gets its gradients and is the only one to apply their mean

Either sums the ranks' gradients of a row in the order of the ranks, so both give the same bits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from byrote.memory.lookup import sum_rows
from byrote.tables.placements.sharded import ShardedTable
from byrote.tables.table import Table


def exchange(table: Table, rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """rows int64 [U] and gradient float32 [U, W] of this rank -> those that it has to apply, averaged over the ranks.

    Collective: every rank calls it for every table, with no rows too.
    """
    return mean_at_owners(table, rows, gradient) if isinstance(table, ShardedTable) else mean_over_ranks(rows, gradient)


def totals(table: Table, *numbers: int) -> list[int]:
    """Numbers of what this rank has to apply -> those of the whole table, the same on all ranks."""
    return table.ranks.sum(list(numbers)) if isinstance(table, ShardedTable) else list(numbers)


def mean_at_owners(table: ShardedTable, rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Unique ascending rows [U] and their gradients [U, W] of this rank -> of all ranks, those of the rows it owns."""
    rows, gradient = rows.cpu(), gradient.cpu()
    route = table.ranks.route(rows)
    rows, gradient = sum_rows(route.there(rows), route.there(gradient))
    return rows, gradient / table.ranks.world


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
    rows, gradient = sum_rows(rows, gradient)
    return rows, gradient / world


def _gather(tensor: Tensor, longest: int) -> list[Tensor]:
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    return parts
