"""Multi-token prediction: module k looks at a token's streams and the k-th token after it, and predicts the next.

DeepSeek-V3 section 2.2, equations 21-25, for module k = 1 .. D and token i, with h^0 the streams that leave the trunk:

    h'_i^k = W [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_i^{k-1})]      W [d, 2d]
    h_i^k  = Block_k(h'^k)_i                                     streams, which module k + 1 starts from
    p_{i+k+1} = softmax(Head(RMSNorm(exit(h_i^k))))
    L = L_main + lambda / D sum_k CE_k,   CE_k = -1/T sum_i log p_{i+k+1}[t_{i+k+1}]

The order is a trap: the paper writes [hidden ; embedding], released checkpoints and transformers have what stands here.

With n streams the embedding meets each of them, by the same W; the norm of h is over d, stream by stream. V4 does so
too (its e_proj(e) + h_proj(x_m) is W in two halves). Each module has an exit and a norm of its own; embedding and head
are the main model's.

Shapes: embeddings [B, T, d], streams [B, T, n, d]. Nothing is cut off: at every i stands a k-th next token, and whoever
shifts sees to it that those which belong to nobody (behind the row, in the next document) are never a target.
Left out: the block, which is handed in, and a memory in it: whether drafts should look things up is an open question.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from byrote.nn.norm import RMSNorm


class PredictionModule(nn.Module):
    """`block(streams, ...)` returns a tuple that begins with streams; `exit` makes one of n."""

    def __init__(self, hidden_size: int, block: nn.Module, exit: nn.Module, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.embed_norm = RMSNorm(hidden_size, eps=eps)
        self.hidden_norm = RMSNorm(hidden_size, eps=eps)
        self.project = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.block = block
        self.exit = exit
        self.norm = RMSNorm(hidden_size, eps=eps)

    def combine(self, embeddings: Tensor, streams: Tensor) -> Tensor:
        """h' [B, T, n, d] of the k-th next tokens' embeddings and of h^{k-1}."""
        next_token = self.embed_norm(embeddings).unsqueeze(2).expand_as(streams)
        # Back to the streams' dtype: autocast computes the product in less, the residual stays what it was.
        return self.project(torch.cat([next_token, self.hidden_norm(streams)], dim=-1)).to(streams.dtype)

    def forward(self, embeddings: Tensor, streams: Tensor, *args: Any) -> tuple[Tensor, Any]:
        """(what the head reads [B, T, d], what the block returned); `args` go to the block behind the streams."""
        output = self.block(self.combine(embeddings, streams), *args)
        return self.norm(self.exit(output[0])), output


def shift(values: Tensor, steps: int, empty: float = 0) -> Tensor:
    """values [B, T, ...] moved left by `steps`: at place i stands what stood at i + steps, `empty` behind the row."""
    steps = min(steps, values.shape[1])
    return torch.cat([values[:, steps:], torch.full_like(values[:, :steps], empty)], dim=1)
