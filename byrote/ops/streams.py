"""What a connection does to its streams; mHC (2512.24880) equations 3 and 7 to 9.

    project      z = (W vec X) / sqrt(mean(vec X ^ 2) + eps)        all numbers that the coefficients come from
    read         x = sum_k pre_k X_k
    write        X'_i = sum_k H_ik X_k + post_i y

and, of a manifold connection of four streams, all of it as one node of the graph and its write as another:

    connect      x = pre X,  with pre, post and H of scale z + bias        (byrote.nn.hyper)
    write_back   X' = H X + post y

Shapes, N tokens: X [N, n, d], W [m, n d], z [N, m], x and y [N, d], pre and post [N, n], H [N, n, n] (new, old).

The streams are the largest tensor of a block, and what a connection costs is how often they pass through memory. By
themselves project, read, write and Sinkhorn make many small nodes and three running sums of the gradient of X. In
`connect` all coefficients of 16 tokens are found, and differentiated, while these tokens are in a cache, and

    dX = H^T dX' + pre dx + (what comes through z)

is written once, in its backward, which has H. Therefore `write_back` hands dX' itself back as the gradient of its X,
without H: the X that `connect` hands on is for `write_back` alone. float32 on a CPU, d a multiple of 16, convention
"deepseek_v4"; the twin, and what runs everywhere else, is `ManifoldConnection.coefficients` with the three above.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from byrote.compiled.loops import run
from byrote.ops.dispatch import compilable

STREAMS = 4


def project(streams: Tensor, weight: Tensor, eps: float) -> Tensor:
    flat = streams.flatten(1)  # dividing after the product: it is one number a token
    return F.linear(flat, weight) * (flat.square().mean(dim=1, keepdim=True) + eps).rsqrt()


def read(streams: Tensor, pre: Tensor) -> Tensor:
    return (pre.unsqueeze(1) @ streams).squeeze(1)


def write(streams: Tensor, y: Tensor, mix: Tensor, post: Tensor) -> Tensor:
    return torch.cat([mix, post.unsqueeze(2)], dim=2) @ torch.cat([streams, y.unsqueeze(1)], dim=1)


def connectable(streams: Tensor, eps: float) -> bool:
    """Whether X [N, n, d] can take this way; eps keeps Sinkhorn's scaling vectors in float32's range."""
    return compilable("connect", streams) and streams.shape[1] == STREAMS and streams.shape[2] % 16 == 0 and eps >= 1e-7


def connect(
    streams: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, norm_eps: float, eps: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, post, H, X"""
    return _Connect.apply(streams, weight, bias, scale, norm_eps, eps, 2 * iterations - 1)  # type: ignore[no-any-return]


def write_back(streams: Tensor, y: Tensor, mix: Tensor, post: Tensor) -> Tensor:
    return _WriteBack.apply(streams, y, mix, post)  # type: ignore[no-any-return]


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, norm_eps: float, eps: float, steps: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from byrote.ops.loops import connect as loops

        kept, bias, scale = streams.contiguous(), bias.contiguous(), scale.contiguous()
        z = F.linear(kept.flatten(1), weight)
        x, pre, post = torch.empty_like(kept[:, 0]), kept.new_empty(len(z), STREAMS), kept.new_empty(len(z), STREAMS)
        mix = kept.new_empty(len(z), STREAMS, STREAMS)
        inputs = kept, z, bias, scale, norm_eps, eps, steps  # z becomes weight RMS(vec X)
        run(loops.connect, *inputs, x, pre, post, mix)
        ctx.save_for_backward(kept, weight, bias, scale, z, pre, post, mix)
        ctx.options = norm_eps, eps, steps
        return x, post, mix, kept.view_as(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from byrote.ops.loops import connect as loops

        streams, weight, bias, scale, z, pre, post, mix = ctx.saved_tensors
        arrived = [gradient.contiguous() for gradient in gradients]
        to_streams, to_z = torch.empty_like(streams), torch.empty_like(z)
        to_bias, to_scale = torch.empty_like(bias), torch.empty_like(bias)
        inputs = streams, bias, scale, z, pre, post, mix, *ctx.options, *arrived
        run(loops.connect_backward, *inputs, to_streams, to_z, sums=[to_bias, to_scale])
        to_streams.flatten(1).addmm_(to_z, weight)
        groups = to_scale.split([STREAMS, STREAMS, STREAMS**2])
        to_scale = torch.stack([group.sum() for group in groups])
        return to_streams, to_z.T @ streams.flatten(1), to_bias, to_scale, None, None, None


class _WriteBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, mix: Tensor, post: Tensor) -> Tensor:
        from byrote.ops.loops import streams as loops

        y = y.contiguous()
        ctx.save_for_backward(streams, y, post)
        out = torch.empty_like(streams)
        run(loops.write, streams, y, mix, post, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        from byrote.ops.loops import streams as loops

        streams, y, post = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        to_y, to_post, to_mix = torch.empty_like(y), torch.empty_like(post), post.new_empty(len(post), STREAMS, STREAMS)
        run(loops.write_back_backward, streams, y, post, gradient, to_y, to_mix, to_post)
        return gradient, to_y, to_mix, to_post
