"""Muon: momentum whose singular values are all made one (Jordan et al. 2024; Moonlight, arXiv 2502.16982, section 2).

For a weight W [a, b] with gradient G, rate lr, decay wd:

    M <- mu M + (1 - mu) G
    N  = mu M + (1 - mu) G  (Nesterov; without it N = M)          only its direction counts
    O  = orthogonalize(N)
    W <- (1 - lr wd) W - lr c O      c = 0.2 sqrt(max(a, b))      "rms": O has RMS 1/sqrt(max(a, b)), AdamW's is 0.2 to
                                                                  0.4, so AdamW's lr and wd may be kept (Moonlight)
                                     c = sqrt(max(1, a / b))      "jordan": of the original code

orthogonalize is U S V^T -> U p(S / |S|) V^T by Newton-Schulz, without a decomposition; X is N / |N| (Frobenius), wide:

    X <- a X + (b A + c A^2) X,  A = X X^T       for each (a, b, c) of the coefficients

    jordan    5 x (3.4445, -4.7750, 2.0315)                       singular values end in [0.68, 1.20]
    hybrid    8 x the same, then 2 x (2, -1.5, 0.5)               DeepSeek-V4: within 5.4e-4 of 1

(From S / |S| of 3e-3 and 3e-4 on; the share of smaller ones is raised less, and 0 stays 0.) Hybrid needs float32 to be
what it says: in bfloat16 it ends within about 6e-3. So `dtype` is float32 here unless given, while Jordan, Moonlight
and torch compute in bfloat16, which is the faster choice for large matrices. The momentum has the parameter's dtype, as
AdamW's moments have.

Shapes: all leading dimensions are a stack of matrices, each on its own: experts [E, a, b]. `blocks` cuts the rows of
each matrix into equal parts that are matrices of their own: gate and up [E, 2w, d]. An expert without a token goes on
along its momentum, at full length until the momentum is below 1e-7.

Equal to `torch.optim.Muon` on [a, b] with dtype bfloat16. Left out: stacking equal shapes of different layers, and
sharded matrices (DTensor).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Triple = tuple[float, float, float]
QUINTIC: Triple = (3.4445, -4.7750, 2.0315)
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "jordan": (QUINTIC,) * 5,
    "hybrid": (QUINTIC,) * 8 + ((2.0, -1.5, 0.5),) * 2,
}
EPS = 1e-7


def orthogonalize(
    matrices: Tensor, coefficients: tuple[Triple, ...] = COEFFICIENTS["hybrid"], dtype: torch.dtype = torch.float32
) -> Tensor:
    """[..., a, b] -> the same shape in `dtype`, each matrix with singular values near one."""
    if matrices.dim() < 2:
        raise ValueError(f"matrices has shape {tuple(matrices.shape)}; give [..., a, b], and vectors to AdamW")
    tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if tall else matrices
    x = wide.to(dtype).reshape(-1, *wide.shape[-2:])
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.reshape(wide.shape)
    return x.mT if tall else x


@dataclass(frozen=True, kw_only=True)
class Muon:
    """The rule with its constants; the rate and the decay are the caller's."""

    momentum: float = 0.95
    nesterov: bool = True
    coefficients: Literal["hybrid", "jordan"] = "hybrid"
    scale: Literal["rms", "jordan"] = "rms"
    dtype: torch.dtype = torch.float32  # of the Newton-Schulz iteration

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must lie in [0, 1)")
        if self.coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients is {self.coefficients!r}; it must be one of {tuple(COEFFICIENTS)}")
        if self.scale not in ("rms", "jordan"):
            raise ValueError(f"scale is {self.scale!r}; it must be 'rms' or 'jordan'")
        if self.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {self.dtype}; give torch.float32 or torch.bfloat16 (float16 overflows)")

    def direction(self, gradient: Tensor, momentum: Tensor, blocks: int = 1) -> tuple[Tensor, Tensor]:
        """O in `dtype` and the new momentum, from gradients and momenta [..., a, b]."""
        if gradient.dim() < 2 or gradient.shape[-2] % blocks:
            raise ValueError(f"a gradient of shape {tuple(gradient.shape)} has no {blocks} blocks of equally many rows")
        momentum = torch.lerp(momentum, gradient, 1 - self.momentum)
        mixed = torch.lerp(gradient, momentum, self.momentum) if self.nesterov else momentum
        matrices = mixed.unflatten(-2, (blocks, -1))
        return orthogonalize(matrices, COEFFICIENTS[self.coefficients], self.dtype).flatten(-3, -2), momentum

    def length(self, shape: torch.Size, blocks: int = 1) -> float:
        """c, which is not multiplied into O because it rounds better in the parameter's dtype."""
        rows, columns = shape[-2] // blocks, shape[-1]
        if self.scale == "rms":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns))
