"""Row gradients between ranks: what DDP's all-reduce is for dense gradients.

DDP and FSDP see only the anchors. Each rank brings its unique (row, gradient) pairs; all ranks get the same sorted
rows and the mean over ranks, so replicated tables that apply it stay equal to the last bit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from byrote.memory.lookup import sum_rows


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
