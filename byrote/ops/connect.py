"""A manifold connection of four streams as one node of the graph, and its write as another; 2512.24880, eq. 3, 7-9.

    connect     x = pre X,  with pre, post and H of z = scale (weight RMS(vec X)) + bias        (byrote.nn.hyper)
    write_back  X' = H X + post y

Shapes: X [N, 4, d], weight [24, 4 d], bias [24], scale [3]; x and y [N, d], post [N, 4], H [N, 4, 4] (new, old).

By themselves project, read, write and Sinkhorn make many small nodes and three running sums of the gradient of X.
Here all coefficients of 16 tokens are found, and differentiated, while these tokens are in a cache, and

    dX = H^T dX' + pre dx + (what comes through z)

is written once, in the backward of `connect`, which has H. Therefore `write_back` hands dX' itself back as the gradient
of its X, without H: the X that `connect` hands on is for `write_back` alone. float32 on a CPU, d a multiple of 16,
convention "deepseek_v4"; everything else, and the twin, is `ManifoldConnection.coefficients` with `byrote.ops.streams`.
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
        kept, bias, scale = streams.contiguous(), bias.contiguous(), scale.contiguous()
        z = F.linear(kept.flatten(1), weight)
        x, pre, post = torch.empty_like(kept[:, 0]), kept.new_empty(len(z), STREAMS), kept.new_empty(len(z), STREAMS)
        mix = kept.new_empty(len(z), STREAMS, STREAMS)
        inputs = kept, z, bias, scale, norm_eps, eps, steps  # z becomes weight RMS(vec X)
        run(_loops().connect, *inputs, x, pre, post, mix)
        ctx.save_for_backward(kept, weight, bias, scale, z, pre, post, mix)
        ctx.options = norm_eps, eps, steps
        return x, post, mix, kept.view_as(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        streams, weight, bias, scale, z, pre, post, mix = ctx.saved_tensors
        arrived = [gradient.contiguous() for gradient in gradients]
        to_streams, to_z = torch.empty_like(streams), torch.empty_like(z)
        to_bias, to_scale = torch.empty_like(bias), torch.empty_like(bias)
        inputs = streams, bias, scale, z, pre, post, mix, *ctx.options, *arrived
        run(_loops().connect_backward, *inputs, to_streams, to_z, sums=[to_bias, to_scale])
        to_streams.flatten(1).addmm_(to_z, weight)
        groups = to_scale.split([STREAMS, STREAMS, STREAMS**2])
        to_scale = torch.stack([group.sum() for group in groups])
        return to_streams, to_z.T @ streams.flatten(1), to_bias, to_scale, None, None, None


class _WriteBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, mix: Tensor, post: Tensor) -> Tensor:
        y = y.contiguous()
        ctx.save_for_backward(streams, y, post)
        out = torch.empty_like(streams)
        run(_stream_loops().write, streams, y, mix, post, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        streams, y, post = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        to_y, to_post, to_mix = torch.empty_like(y), torch.empty_like(post), post.new_empty(len(post), STREAMS, STREAMS)
        run(_stream_loops().write_back_backward, streams, y, post, gradient, to_y, to_mix, to_post)
        return gradient, to_y, to_mix, to_post


def _loops() -> Any:
    from byrote.ops.loops import connect

    return connect


def _stream_loops() -> Any:
    from byrote.ops.loops import streams

    return streams
