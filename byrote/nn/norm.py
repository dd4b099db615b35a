"""RMSNorm (1910.07467): y = s x * weight, s = 1 / sqrt(mean(x^2) + eps), over the last dimension.

torch's, which on a CPU is five operations forward and twice as many backward, each with a pass of its own. In float32
on a CPU compiled loops replace them, with the gradients

    dx = s (dy * weight - x s^2 mean(dy * weight * x)),   dweight = sum s dy * x

Shapes: x [..., d], weight [d] -> [..., d].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from byrote.compiled.loops import run
from byrote.ops.dispatch import compilable, learned


class RMSNorm(nn.RMSNorm):
    """In the precision of the weight, which autocast leaves in float32; the answer is in that of x."""

    def forward(self, x: Tensor) -> Tensor:
        weight, eps = self.weight, self.eps
        if eps is None or x.shape[-1:] != weight.shape or not compilable("norm", x, weight):
            return super().forward(x.to(weight.dtype)).to(x.dtype)
        if learned(x, weight):
            return _Normalize.apply(x, weight, eps)  # type: ignore[no-any-return]
        return _normalize(x, weight, eps)[0]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, tokens, scales = _normalize(x, weight, eps)
        ctx.save_for_backward(tokens, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        tokens, weight, scales = ctx.saved_tensors
        to_out = gradients[0].reshape(tokens.shape).contiguous()
        to_x, to_weight = torch.empty_like(tokens), torch.empty_like(weight)
        run(_loops().normalize_backward, tokens, weight, scales, to_out, to_x, sums=[to_weight])
        return to_x.view(gradients[0].shape), to_weight, None


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, x as tokens [N, d], s [N]"""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    out, scales = torch.empty_like(tokens), tokens.new_empty(len(tokens))
    run(_loops().normalize, tokens, weight, eps, out, scales)
    return out.view(x.shape), tokens, scales


def _loops() -> Any:
    from byrote.ops.loops import norm

    return norm
