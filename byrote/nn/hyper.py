"""How a sublayer reads from and writes to the residual streams: `x, write = connect(streams)`, `streams = write(f(x))`.

Streams X are [B, T, n, d]; x and f(x) are [B, T, d]. Three connections:

    Residual                 n = 1           x = X,    X <- X + f(x)
    HyperConnection          2409.19606      x = pre X,  X <- H X + post f(x);  pre, post [n], H [n, n] (out, in)
    ManifoldConnection       2512.24880      the same with H doubly stochastic, so that no stream grows by mixing

HyperConnection, from each stream k by itself; equations 2 and 5, as mHC's section 3 writes them:

    pre_k, post_k, H_ik = scale tanh(weight RMS(X_k)) + bias                    weight [n + 2, d]

ManifoldConnection, from all streams together; equations 7 to 9:

    (z_pre, z_post, z_H) = scale (weight RMS(vec X)) + bias                     weight [2n + n^2, n d]
    pre = sigmoid(z_pre),  post = 2 sigmoid(z_post),  H = sinkhorn(z_H)

with one scale each for pre, post and H. DeepSeek-V4 adds 1e-6 to pre and in Sinkhorn, and lays z_H out as (in, out):
convention "deepseek_v4", whose checkpoints' fn, base and scale are our weight, bias and scale. "paper" does neither.

The last streams are one again by their mean (`MeanExit`) or by V4's head (`GatedExit`; the paper is silent):

    sum_k (sigmoid(z_k) + 1e-6) X_k,   z = scale (weight RMS(vec X)) + bias     weight [n, n d]

The start. All streams are copies of the embedding; weight = 0, scale = 0.01, and the biases give sum(pre) = 1,
post = 1, rows of H that sum to 1, and the mean as exit: whatever H is, this is the plain residual net (HC to the bit,
mHC to 1e-6 a sublayer, V4's eps). But while the biases are the same for every stream, so are the gradients, and the
streams never come apart. So sublayer l reads stream l mod n: alone in HC (its section 3), all but 3e-4 a stream in
mHC. The less closed the others, the slower they come apart: spread 0.013 after 10 steps at COLD = 8, 0.0004 at 2.

Computed in float32 whatever the dtype. Left out: norms with a gain (weight can hold it), fused kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from byrote.ops.sinkhorn import sinkhorn
from byrote.ops.streams import connect, connectable, project, read, write, write_back

Write = Callable[[Tensor], Tensor]
Copy = Callable[[Tensor, Tensor], Tensor]
Convention = Literal["deepseek_v4", "paper"]

EPS = 1e-6  # DeepSeek-V4's hc_eps
SCALE = 0.01
COLD = 8.0  # logit below which a sigmoid or a softmax counts as closed


class Residual(nn.Module):
    """The plain residual of one stream."""

    def forward(self, streams: Tensor) -> tuple[Tensor, Write]:
        return streams.squeeze(2), lambda y: streams + y.unsqueeze(2)


class _Connection(nn.Module):
    """Reads and writes by coefficients that a subclass finds; `sublayer` counts from 0 over the whole model."""

    def __init__(self, weight: tuple[int, int], num_streams: int, sublayer: int, norm_eps: float) -> None:
        super().__init__()
        self.num_streams, self.first, self.norm_eps = num_streams, sublayer % num_streams, norm_eps
        self.weight = nn.Parameter(torch.empty(weight))
        self.bias = nn.Parameter(torch.empty(num_streams * (num_streams + 2)))
        self.scale = nn.Parameter(torch.empty(3))
        self.reset()

    @torch.no_grad()
    def reset(self, copy: Copy = Tensor.copy_) -> None:
        """Start as the plain residual. `copy` may be transformers', which spares what a checkpoint has loaded."""
        copy(self.weight, torch.zeros_like(self.weight))
        copy(self.bias, self.start())
        copy(self.scale, torch.full_like(self.scale, SCALE))

    def start(self) -> Tensor:
        """The biases of pre, post and H, flat."""
        raise NotImplementedError

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pre [N, n], post [N, n], H [N, n, n] of streams [N, n, d]."""
        raise NotImplementedError

    def forward(self, streams: Tensor) -> tuple[Tensor, Write]:
        shape, dtype = streams.shape, streams.dtype
        with torch.autocast(streams.device.type, enabled=False):
            x, exact, mix, post, write = self.connect(_at_least_float32(streams).flatten(0, 1))

        def write_back(y: Tensor) -> Tensor:
            with torch.autocast(streams.device.type, enabled=False):
                return write(exact, y.to(exact.dtype).flatten(0, 1), mix, post).view(shape).to(dtype)

        return x.view(shape[0], shape[1], shape[3]).to(dtype), write_back

    def connect(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Callable[..., Tensor]]:
        """x [N, d]; and what the write needs: the streams, H, post, and the function that takes them."""
        pre, post, mix = self.coefficients(streams)
        return read(streams, pre), streams, mix, post, write


class HyperConnection(_Connection):
    """Static and dynamic coefficients without a constraint (2409.19606, dynamic form): one sublayer of n streams."""

    def __init__(self, hidden_size: int, num_streams: int, sublayer: int = 0, *, norm_eps: float = 1e-6) -> None:
        super().__init__((num_streams + 2, hidden_size), num_streams, sublayer, norm_eps)

    def start(self) -> Tensor:
        n = self.num_streams
        pre = torch.eye(n)[self.first]
        return torch.cat([pre, torch.ones(n), torch.eye(n).flatten()])

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.num_streams
        weight, bias, scale = (_at_least_float32(p) for p in (self.weight, self.bias, self.scale))
        moved = F.linear(F.rms_norm(streams, streams.shape[-1:], None, self.norm_eps), weight).tanh().mT
        pre, post, mix = moved.split([1, 1, n], dim=-2)  # [N, coefficients, n]
        pre_bias, post_bias, mix_bias = bias.split([n, n, n * n])
        return (
            scale[0] * pre.squeeze(-2) + pre_bias,
            scale[1] * post.squeeze(-2) + post_bias,
            scale[2] * mix + mix_bias.view(n, n),
        )


class ManifoldConnection(_Connection):
    """mHC (2512.24880): the mix of the streams is doubly stochastic, by Sinkhorn, in one of two conventions."""

    def __init__(
        self,
        hidden_size: int,
        num_streams: int,
        sublayer: int = 0,
        *,
        convention: Convention = "deepseek_v4",
        iterations: int = 20,
        norm_eps: float = 1e-6,
    ) -> None:
        if convention not in ("deepseek_v4", "paper"):
            raise ValueError(f"convention is {convention!r}; it must be 'deepseek_v4' or 'paper'")
        self.input_first = convention == "deepseek_v4"
        self.eps = EPS if convention == "deepseek_v4" else 0.0
        self.iterations = iterations
        weight = (num_streams * (num_streams + 2), num_streams * hidden_size)
        super().__init__(weight, num_streams, sublayer, norm_eps)

    def start(self) -> Tensor:
        n = self.num_streams
        closed = torch.full((n,), 1 / (1 + math.exp(COLD)), dtype=torch.float64)
        closed[self.first] = 1 - (n - 1) * closed[0]
        mix = COLD * (torch.eye(n, dtype=torch.float64) - 1)
        return torch.cat([(closed - self.eps).logit(), torch.zeros(n), mix.flatten()]).float()

    def connect(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Callable[..., Tensor]]:
        if not (self.input_first and connectable(streams, self.eps)):
            return super().connect(streams)
        weight, bias, scale = (_at_least_float32(p) for p in (self.weight, self.bias, self.scale))
        x, post, mix, streams = connect(streams, weight, bias, scale, self.norm_eps, self.eps, self.iterations)
        return x, streams, mix, post, write_back

    def coefficients(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.num_streams
        weight, bias, scale = (_at_least_float32(p) for p in (self.weight, self.bias, self.scale))
        z = project(streams, weight, self.norm_eps)
        sizes = torch.tensor([n, n, n * n], device=scale.device)
        z = torch.addcmul(bias, z, scale.repeat_interleave(sizes, output_size=len(bias)))
        pre, post, logits = z.T.contiguous().split([n, n, n * n])  # tokens last, for whole vectors
        logits = logits.unflatten(0, (n, n))
        if self.input_first:
            logits = logits.transpose(0, 1)
        mix = sinkhorn(logits, iterations=self.iterations, eps=self.eps).permute(2, 0, 1)
        return (pre.sigmoid() + self.eps).T, 2 * post.sigmoid().T, mix


class MeanExit(nn.Module):
    """The mean over the streams: [B, T, n, d] -> [B, T, d]."""

    def forward(self, streams: Tensor) -> Tensor:
        return streams.squeeze(2) if streams.shape[2] == 1 else streams.mean(dim=2)


class GatedExit(nn.Module):
    """DeepSeek-V4's head; starts as the mean."""

    def __init__(self, hidden_size: int, num_streams: int, *, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.num_streams, self.norm_eps = num_streams, norm_eps
        self.weight = nn.Parameter(torch.empty(num_streams, num_streams * hidden_size))
        self.bias = nn.Parameter(torch.empty(num_streams))
        self.scale = nn.Parameter(torch.empty(1))
        self.reset()

    @torch.no_grad()
    def reset(self, copy: Copy = Tensor.copy_) -> None:
        share = 1 / self.num_streams - EPS
        copy(self.weight, torch.zeros_like(self.weight))
        copy(self.bias, torch.full_like(self.bias, math.log(share / (1 - share))))
        copy(self.scale, torch.full_like(self.scale, SCALE))

    def forward(self, streams: Tensor) -> Tensor:
        weight, bias, scale = (_at_least_float32(p) for p in (self.weight, self.bias, self.scale))
        exact = _at_least_float32(streams)
        with torch.autocast(streams.device.type, enabled=False):
            exact = exact.flatten(0, 1)
            x = read(exact, (project(exact, weight, self.norm_eps) * scale + bias).sigmoid() + EPS)
        return x.view(streams.shape[0], streams.shape[1], -1).to(streams.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
