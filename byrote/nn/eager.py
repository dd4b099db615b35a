"""Attention by plain products, whose weights can be seen: what `attn_implementation="eager"` asks for.

    weights = softmax(scale q k^T), 0 where the mask forbids;  o = weights v

Shapes: query [B, H, T, n]; key [B, G, S, n] and value [B, G, S, v], G a divisor of H; mask bool [B, 1, T, S], None:
plain causal, or a single token that sees all; -> [B, H, T, v].
"""

from __future__ import annotations

import torch
from torch import Tensor


class Shares:
    """Takes the weights [B, H, T, S] of all that is handed it. No list itself: offloading hands on copies of those."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []


def attend_eagerly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, shares: Shares
) -> Tensor:
    """A query that may look nowhere gets 0, and gives no gradient."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.to(query.dtype).repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.matmul(query, key.mT) * scale
    tokens = query.shape[2]
    if mask is None and tokens > 1:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    blind = None
    if mask is not None:
        blind = ~mask.any(dim=-1, keepdim=True)
        scores = scores.masked_fill(~(mask | blind), float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if blind is not None:
        weights = weights.masked_fill(blind, 0.0)
    weights = weights.to(query.dtype)
    shares.seen.append(weights)
    return torch.matmul(weights, value)
