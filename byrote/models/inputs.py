"""What a caller can get wrong is refused here, before a cache, a table or a counter is written to.

input_ids, labels [B, T]; attention_mask [B, past + T]; position_ids [B, T] or [1, T];
inputs_embeds [B, T, d].
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_ids(input_ids: Tensor | None, inputs_embeds: Tensor | None, hidden_size: int) -> Tensor:
    """The ids, if these are ids at all; whether the vocabulary has them is for the addresses to say."""
    if input_ids is None:
        raise ValueError("input_ids is missing: a memory is addressed by token ids; pass them beside inputs_embeds")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be integers [B, T], got {input_ids.dtype} {list(input_ids.shape)}")
    if not input_ids.numel():
        raise ValueError(f"input_ids is {list(input_ids.shape)}: give at least one token")
    _check_shape("inputs_embeds", inputs_embeds, [*input_ids.shape, hidden_size])
    return input_ids


def check_places(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past: int) -> None:
    batch, steps = input_ids.shape
    _check_shape("attention_mask", attention_mask, [batch, past + steps], " (cached and new tokens)")
    if position_ids is not None and list(position_ids.shape) != [1, steps]:
        _check_shape("position_ids", position_ids, [batch, steps])


def check_labels(labels: Tensor | None, input_ids: Tensor | None, vocab_size: int) -> None:
    if labels is None or input_ids is None:
        return
    _check_shape("labels", labels, list(input_ids.shape))
    unknown = (labels != -100) & ((labels < 0) | (labels >= vocab_size))
    if bool(unknown.any()):
        row, position = (int(index) for index in unknown.nonzero()[0])
        raise ValueError(
            f"labels[{row}, {position}] is {int(labels[row, position])}; "
            f"give ids below vocab_size={vocab_size}, and -100 where nothing is predicted"
        )


def _check_shape(name: str, tensor: Tensor | None, shape: list[int], meaning: str = "") -> None:
    if tensor is not None and list(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}{meaning}, got {list(tensor.shape)}")
