"""What a forward returns beside Hugging Face's fields, and the loss of the prediction modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from byrote.nn.mtp import shift
from byrote.ops.cross_entropy import head_loss


@dataclass
class EngramOutput(CausalLMOutputWithPast):
    """`mtp_loss`: in training, sum of CE_k / D, unweighted, without a graph. `streams` [B, T, n, d]: if asked for."""

    mtp_loss: Tensor | None = None
    streams: Tensor | None = None


class Prediction(NamedTuple):
    """Of one module: hidden [B, T, d] for the head; aimed bool [B, T], where the token to be predicted belongs."""

    hidden: Tensor
    aimed: Tensor


def mtp_loss(head: nn.Module, predictions: Iterable[Prediction], labels: Tensor, total: Tensor | int) -> Tensor:
    """1/D sum_k CE_k. All are divided by `total`, the main loss's number of targets (V3's T), so that a batch in parts
    has the loss of the whole.
    """
    losses = []
    for k, (hidden, aimed) in enumerate(predictions, start=1):
        targets = shift(labels, k + 1, empty=-100).masked_fill(~aimed, -100)
        losses.append(head_loss(head, hidden, targets))
    return torch.stack(losses).mean() / total
