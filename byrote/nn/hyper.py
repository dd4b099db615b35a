"""How a sublayer reads from and writes to the residual streams: `x, write = connect(streams)`, `streams = write(f(x))`.

Streams are [B, T, n, d]. The plain residual is the case n = 1: a sublayer reads the stream and adds to it.
Hyper-connections (n > 1) are other connections behind the same call.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Residual(nn.Module):
    """The plain residual of one stream."""

    def forward(self, streams: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """streams [B, T, 1, d] -> x [B, T, d] and the write that takes f(x) [B, T, d] to the new streams."""
        return streams.squeeze(2), lambda y: streams + y.unsqueeze(2)
