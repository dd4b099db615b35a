"""RMSNorm (1910.07467): y = s x * weight, s = 1 / sqrt(mean(x^2) + eps), over the last dimension.

Shapes: x [..., d], weight [d] -> [..., d].
"""

from __future__ import annotations

from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's, in the precision of its weight: autocast leaves that in float32 and there is no mixed kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
