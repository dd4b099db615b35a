"""A memory without a gate: its rows are projected and added to every stream. The control of the gate's worth.

    streams^(m) <- streams^(m) + W_V e          (hashed n-grams in the residual: nanochat's log of January 2026)
"""

from __future__ import annotations

from torch import Tensor, nn


class UngatedMemory(nn.Module):
    """Called as byrote.nn.engram.Engram, without a convolution and so without a tail."""

    def __init__(self, hidden_size: int, memory_size: int) -> None:
        super().__init__()
        self.value = nn.Linear(memory_size, hidden_size, bias=False)

    def forward(
        self, streams: Tensor, embeddings: Tensor, alive: Tensor, starts: Tensor, tail: None = None
    ) -> tuple[Tensor, None]:
        """streams [B, T, n, d], embeddings [B, T, d_mem] -> addend [B, T, n, d], zero at dead tokens; no columns."""
        value = self.value(embeddings) * alive.unsqueeze(-1)
        return value.unsqueeze(2).expand_as(streams), None
