"""RMSNorm (1910.07467): y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension.

torch's, which on a CPU is five operations, each with a pass of its own. In evaluation without gradients, in float32
on a CPU, one compiled loop replaces them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from byrote.compiled import compilable, run


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        fits = compilable(x) and self.weight.dtype == torch.float32 and x.shape[-1:] == self.weight.shape
        # In training a block that is recomputed runs without and with gradients, and must round alike.
        if self.eps is None or not fits or self.training or torch.is_grad_enabled():
            return super().forward(x)
        from byrote.nn.kernels.decode import normalize

        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out = torch.empty_like(flat)
        run(normalize, flat, self.weight, self.eps, out)
        return out.view(x.shape)
