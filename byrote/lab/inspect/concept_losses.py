"""Does a model predict better near the beginning of a concept? Losses of single tokens, by how old the newest one is.

DLCM (2512.24617) section 7.2, figure 7, found a U: against its baseline better at the first tokens of a concept and at
late ones, worse between. Index i of a token is the number of tokens since its newest concept formed; 0 is the boundary
itself. The loss at a token is that of predicting the next one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byrote.data.packing import IGNORED, Batch


@dataclass(frozen=True)
class TokenLosses:
    """Of every token at which something is predicted: nats [N]; of models with concepts also its index [N]."""

    nats: Tensor
    index: Tensor | None


@torch.no_grad()
def token_losses(model: nn.Module, batches: Iterable[Batch]) -> TokenLosses:
    nats, indices = [], []
    training = model.training
    model.eval()
    for batch in batches:
        targets = batch["labels"][:, 1:]
        found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        losses = F.cross_entropy(found.logits[:, :-1].transpose(1, 2).float(), targets, reduction="none")
        predicted = targets != IGNORED
        nats.append(losses[predicted])
        if found.get("boundaries") is not None:
            indices.append(since_boundary(found.boundaries)[:, :-1][predicted])
    model.train(training)
    return TokenLosses(torch.cat(nats), torch.cat(indices) if indices else None)


def since_boundary(boundaries: Tensor) -> Tensor:
    """int64 [B, T]: tokens since the last boundary of the row, 0 at one. A row begins with one."""
    steps = torch.arange(boundaries.shape[1], device=boundaries.device).expand_as(boundaries)
    return steps - torch.where(boundaries, steps, 0).cummax(dim=1).values


def by_index(ours: TokenLosses, baseline: TokenLosses, most: int = 20) -> list[tuple[int, int, float, float]]:
    """(index, tokens, our mean loss, the baseline's mean loss at the same tokens) for each index below `most`."""
    assert ours.index is not None and len(ours.nats) == len(baseline.nats)
    rows = []
    for i in range(most):
        here = ours.index == i
        if here.any():
            rows.append((i, int(here.sum()), float(ours.nats[here].mean()), float(baseline.nats[here].mean())))
    return rows
