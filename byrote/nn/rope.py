"""Rotary positions, in interleaved pairs, with YaRN.

    f_i      = theta^(-2i/D),  i = 0 .. D/2-1
    (x_2i, x_2i+1) -> rotated by position * f_i      RoFormer section 3.2; DeepSeek pairs neighbors

YaRN (2309.00071 section 3.2; the ramp as in DeepSeek's `precompute_freqs_cis`) stretches the slow
frequencies by s:

    dim(r)   = D ln(L / (2 pi r)) / (2 ln theta)     the index whose wave turns r times within L
    gamma_i  = clip((i - floor(dim(beta_fast))) / (ceil(dim(beta_slow)) - floor(dim(beta_fast))), 0, 1)
    f_i     <- (1 - gamma_i) f_i + gamma_i f_i / s

The paper ramps over the number of turns; released DeepSeek checkpoints ramp over the index, and so do we.
DeepSeek leaves cos and sin alone and puts the attention temperature on the softmax scale instead,
squared, because only D of a head's dimensions rotate (DeepSeek-V2 section 3.1.4):

    scale    = d_qk^(-1/2) * m^2,  m = 0.1 * mscale * ln(s) + 1

A pair is one complex number, and the rotation one product.

Shapes: position_ids [B, T] -> turns exp(i angle) [B, T, D/2], complex64.
Left out: the generic YaRN temperature on cos and sin, dynamic scaling, the half-split layout.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Yarn:
    """YaRN for a context `factor` times as long (2309.00071). ValueError where it would shorten or invert anything."""

    factor: float  # s: how many times longer the context becomes
    original_length: int  # L: the length that the model was trained on
    beta_fast: float = 32.0  # waves that turn more often than this within L keep their frequency
    beta_slow: float = 1.0  # waves that turn less often than this are stretched by the whole factor
    mscale: float = 1.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor={self.factor} would shorten the context: give a factor of at least 1")
        if self.original_length < 1:
            raise ValueError(f"original_length={self.original_length}: give the training length in tokens")
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(f"beta_fast={self.beta_fast}, beta_slow={self.beta_slow}: give beta_fast > beta_slow > 0")


@lru_cache
def frequencies(dim: int, theta: float, yarn: Yarn | None) -> tuple[float, ...]:
    """The dim/2 frequencies, rounded exactly as the released code rounds them (float32 throughout).

    Python floats and not a buffer: buffers that are not saved hold garbage after `from_pretrained`.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim={dim} cannot be split into rotary pairs: give an even number of dimensions")
    index = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    plain = 1.0 / theta ** (2 * index / dim)
    if yarn is None:
        return tuple(plain.tolist())

    def turning(turns: float) -> float:
        return dim * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turning(yarn.beta_fast)), 0)
    high = min(math.ceil(turning(yarn.beta_slow)), dim - 1)
    ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return tuple((plain / yarn.factor * ramp + plain * (1 - ramp)).tolist())


@lru_cache
def _rates(dim: int, theta: float, yarn: Yarn | None, device: torch.device) -> Tensor:
    return torch.tensor(frequencies(dim, theta, yarn), dtype=torch.float32, device=device)


def rotary(position_ids: Tensor, dim: int, *, theta: float = 10000.0, yarn: Yarn | None = None) -> Tensor:
    """exp(i angle), complex64 [B, T, dim/2], of the angles at each position."""
    # A compiler traces with fake tensors, which must not enter the cache.
    make = _rates.__wrapped__ if torch.compiler.is_compiling() else _rates
    angles = position_ids[..., None].float() * make(dim, theta, yarn, position_ids.device)
    return torch.complex(angles.cos(), angles.sin())


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the pairs of x [B, heads, T, D] by turns [B, T, D/2]. In float32, returned as x came."""
    pairs = x.float().unflatten(-1, (-1, 2)).contiguous()
    # Of one token behind an odd width: contiguous, but not aligned. A compiler cannot tell, and copies nothing twice.
    if torch.compiler.is_compiling() or pairs.storage_offset() % 2:
        pairs = pairs.clone()
    return torch.view_as_real(torch.view_as_complex(pairs) * turns.unsqueeze(1)).flatten(-2).to(x.dtype)


def yarn_softmax_scale(head_dim: int, yarn: Yarn | None = None) -> float:
    """The softmax scale of attention over queries of head_dim dimensions, rotary ones included."""
    temperature = 1.0 if yarn is None else 0.1 * yarn.mscale * math.log(yarn.factor) + 1.0
    return head_dim**-0.5 * temperature**2
