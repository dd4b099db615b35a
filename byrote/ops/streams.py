"""The passes of a connection over its streams, each with a backward of its own; mHC (2512.24880) equations 3 and 7.

    project  z_t  = (W vec X_t) / sqrt(mean(vec X_t ^ 2) + eps)         all numbers that the coefficients come from
    read     x_t  = sum_k pre_tk X_tk
    write    X'_ti = sum_k H_tik X_tk + post_ti y_t

Shapes: X [N, n, d], W [m, n d], z [N, m], x and y [N, d], pre and post [N, n], H [N, n, n] (new, old).

The streams are the largest tensor of a block, and what a connection costs is how often they pass through memory.
`project` and `read` hand X on beside their result, so that in backward the gradient of X is one running sum, in one
place: they overwrite the gradient of the X that they hand on, which is for the next of the three alone. On a CPU, read
and write of four streams are compiled loops, one pass each: for one token they are products of 4 x 4 matrices, too
small for a library. `plain_project`, `plain_read` and `plain_write` are the twins, and what runs for other n, on a GPU,
under torch.compile and in other dtypes than float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from byrote.compiled.loops import run
from byrote.ops.dispatch import compilable


def project(streams: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z, X"""
    if compilable("streams", streams):
        return _Project.apply(streams, weight, eps)  # type: ignore[no-any-return]
    return plain_project(streams, weight, eps), streams


def read(streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """x, X"""
    return _Read.apply(streams, pre) if _fits(streams) else (plain_read(streams, pre), streams)  # type: ignore[no-any-return]


def write(streams: Tensor, y: Tensor, mix: Tensor, post: Tensor) -> Tensor:
    chosen = _Write.apply if _fits(streams) else plain_write
    return chosen(streams, y, mix, post)  # type: ignore[no-any-return]


def _fits(streams: Tensor) -> bool:
    """Whether the compiled loops can take X: they are written for four streams, which is what the papers have."""
    return compilable("streams", streams) and streams.shape[1] == 4 and streams.shape[2] % 16 == 0


def plain_project(streams: Tensor, weight: Tensor, eps: float) -> Tensor:
    flat = streams.flatten(1)  # dividing after the product: it is one number a token
    return F.linear(flat, weight) * (flat.square().mean(dim=1, keepdim=True) + eps).rsqrt()


def plain_read(streams: Tensor, pre: Tensor) -> Tensor:
    return (pre.unsqueeze(1) @ streams).squeeze(1)


def plain_write(streams: Tensor, y: Tensor, mix: Tensor, post: Tensor) -> Tensor:
    return torch.cat([mix, post.unsqueeze(2)], dim=2) @ torch.cat([streams, y.unsqueeze(1)], dim=1)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        streams = streams.contiguous()
        flat = streams.flatten(1)
        scale = (torch.linalg.vector_norm(flat, dim=1, keepdim=True).square_().div_(flat.shape[1]).add_(eps)).rsqrt_()
        z = F.linear(flat, weight).mul_(scale)
        ctx.save_for_backward(flat, weight, scale, z)
        return z, streams.view_as(streams)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        flat, weight, scale, z = ctx.saved_tensors
        to_z, to_streams = gradients
        shrink = (to_z * z).sum(dim=1, keepdim=True).mul_(scale.square()).div_(-flat.shape[1])
        product = to_z * scale
        to_flat = to_streams.contiguous().flatten(1).addcmul_(flat, shrink).addmm_(product, weight)
        return to_flat.view_as(to_streams), product.T @ flat, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
        kept, pre = streams.contiguous(), pre.contiguous()
        ctx.save_for_backward(kept, pre)
        x = torch.empty_like(kept[:, 0])
        run(_loops().read, kept, pre, x)
        return x, streams.view_as(streams)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        streams, pre = ctx.saved_tensors
        to_x, to_streams = (gradient.contiguous() for gradient in gradients)
        to_pre = torch.empty_like(pre)
        run(_loops().read_backward, streams, pre, to_x, to_streams, to_pre)
        return to_streams, to_pre


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, y: Tensor, mix: Tensor, post: Tensor) -> Tensor:
        saved = [tensor.contiguous() for tensor in (streams, y, mix, post)]
        ctx.save_for_backward(*saved)
        out = torch.empty_like(saved[0])
        run(_loops().write, *saved, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        saved = ctx.saved_tensors
        to_each = [torch.empty_like(tensor) for tensor in saved]
        run(_loops().write_backward, *saved, gradients[0].contiguous(), *to_each)
        return tuple(to_each)


def _loops() -> Any:
    from byrote.ops.loops import streams

    return streams
