"""Arguments of a forward that are no parameters of it: what transformers and its collators hand to every model.

A packed batch may say where documents begin in four ways, here all brought to `begins`, bool [B, T]:

    cu_seq_lens_q, cu_seq_lens_k, cu_seqlens   int [documents + 1]: where documents begin and end in the B * T tokens
    seq_idx                                    int [B, T]: the number of the document
    attention_mask                             int [B, past + T]: the number of the document, from 1; 0 at padding
    position_ids                               what models read; where another says the same, both must agree
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
# What follows from the other arguments, or is not for the model.
REPEATED = ("max_length_q", "max_length_k", "max_seqlen", "cache_position", "num_items_in_batch", "return_dict")
# What a model may be told only where it changes nothing.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "output_router_logits": (False,),
    "is_causal": (True,),
}
REMEDY = "let position_ids begin anew at each document, and hide padding by an attention_mask of zeros and ones"


def check_arguments(given: dict[str, Any], forward: Callable[..., Any]) -> None:
    """TypeError for an argument that `forward` neither has nor may leave aside, with the nearest name that it has."""
    for name, value in given.items():
        if value is None or name in BOUNDARIES or name in REPEATED:
            continue
        if name in WITHOUT_EFFECT:
            if value not in WITHOUT_EFFECT[name]:
                raise ValueError(f"{name}={value!r}: the model has no such thing to return or to do; leave it out")
            continue
        if name == "token_type_ids" and not bool(torch.as_tensor(value).any()):
            continue  # some tokenizers hand them over, all zero
        known = [*inspect.signature(forward).parameters, *BOUNDARIES]
        near = difflib.get_close_matches(name, [each for each in known if each not in ("self", "kwargs")], 1, 0.6)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        raise TypeError(f"forward got an argument that it does not have, {name}: {hint}")


def check_mask(mask: Any, batch: int, known: int) -> None:
    """ValueError or TypeError unless `mask` is [batch, known], of bool, of integers, or of the floats 0 and 1."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor [B, past + T], got a {type(mask).__name__}: {REMEDY}")
    if mask.dim() > 2:
        raise ValueError(f"attention_mask must be [B, past + T], got {list(mask.shape)}: {REMEDY}")
    if list(mask.shape) != [batch, known]:
        raise ValueError(f"attention_mask must be {[batch, known]} (cached and new tokens), got {list(mask.shape)}")
    # One that is added to scores has 0 where this one has 1: all zeros would hide everything.
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all() and mask.any()):
        raise ValueError(
            f"attention_mask is {mask.dtype} and not of zeros and ones, 1 at each token to be read: if it is one "
            "that is added to scores, pass attention_mask == 0"
        )


def begins(given: dict[str, Any], input_ids: Tensor, past: int) -> Tensor | None:
    """Where documents begin, bool [B, T], as the arguments in BOUNDARIES say it; None if they are not there."""
    found: dict[str, Tensor] = {}
    for name in BOUNDARIES:
        value = given.get(name)
        if value is None:
            continue
        if past:
            raise ValueError(f"{name} is of a batch without a past, past_key_values holds {past} tokens: {REMEDY}")
        value = torch.as_tensor(value, device=input_ids.device)
        found[name] = _by_number(value, input_ids) if name == "seq_idx" else _by_length(name, value, input_ids)
    if not found:
        return None
    (first, where), *others = found.items()
    for name, other in others:
        if not torch.equal(where, other):
            raise ValueError(f"{name} and {first} begin documents at other tokens: give one of them")
    return where


def numbered(mask: Tensor, steps: int) -> Tensor | None:
    """Where documents begin by a mask of their numbers, bool [B, steps]; None for a mask of zeros and ones."""
    if mask.dtype == torch.bool:
        return None
    least, most = mask.aminmax()
    if least < 0:
        raise ValueError(f"attention_mask has the negative value {int(least)}: {REMEDY}")
    if most <= 1:
        return None
    slots = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    seen = torch.where(mask > 0, slots, -1).cummax(dim=1).values
    before = torch.cat([seen.new_full((len(seen), 1), -1), seen[:, :-1]], dim=1)
    number = mask.gather(1, before.clamp_min(0)).masked_fill(before < 0, 0)
    if bool(((mask > 0) & (mask < number)).any()):  # `generate` goes on with ones
        raise ValueError(f"attention_mask numbers documents that do not ascend: {REMEDY}")
    return ((mask > 0) & (mask != number))[:, -steps:]


def check_agree(where: Tensor, position_ids: Tensor, alive: Tensor) -> None:
    """ValueError where position ids begin a document inside of one."""
    jumps = torch.zeros_like(where)
    jumps[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1) & alive[:, 1:] & alive[:, :-1]
    wrong = jumps & ~where
    if bool(wrong.any()):
        row, step = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"position_ids begin a document at token {step} of row {row}, which is inside of one by the other "
            f"boundaries (one of {', '.join(BOUNDARIES)}, or document numbers in attention_mask): give one of them"
        )


def _by_length(name: str, ends: Tensor, input_ids: Tensor) -> Tensor:
    (batch, steps), listed = input_ids.shape, ends.tolist()
    total = batch * steps
    if ends.dim() != 1 or len(listed) < 2 or listed[0] != 0 or listed[-1] != total or sorted(listed) != listed:
        raise ValueError(f"{name} must go from 0 to the {total} tokens of input_ids and ascend, got {listed}")
    if not set(range(0, total, steps)) <= set(listed):
        raise ValueError(f"{name}={listed} lets a document go on from one row of {steps} tokens into the next")
    where = torch.zeros(total, dtype=torch.bool, device=input_ids.device)
    where[ends[ends < total].long()] = True
    return where.view(batch, steps)


def _by_number(numbers: Tensor, input_ids: Tensor) -> Tensor:
    if list(numbers.shape) not in ([1, input_ids.shape[1]], list(input_ids.shape)):
        raise ValueError(f"seq_idx must be {list(input_ids.shape)}, got {list(numbers.shape)}")
    where = torch.ones_like(input_ids, dtype=torch.bool)
    where[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return where
