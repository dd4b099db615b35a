"""The passes of a memory over its tokens, each with a backward of its own; Engram paper (2601.07372) equations 4 to 6.

    gate_logits  s_tm = sum_c g_mc RMS(k_tm)_c RMS(h_tm)_c / sqrt(d)        g: the product of both gains
    gated        u_tm = gate_tm v_t,    columns_tm = g_m * RMS(u_tm)        g: the gain of the convolution
    convolve     z_t = sum_i taps_i * columns_r,    r = t - (K - 1 - i) dilation, where r is of t's document

Shapes, N tokens, n streams, K taps: h, k, u, columns and z [N, n, d], s and gate [N, n], v [N, d], g [n, d], taps
[K, n, d]. `documents` [N] int64: equal numbers are one document, whose tokens stand together.

These are a few sums a token, for which autograd would keep and pass over some thirty tensors of [N, n, d]: on a CPU,
that is half of what a memory costs. Compiled loops for float32 on a CPU; the plain functions are the twins, and what
runs on a GPU, under torch.compile and in other dtypes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from byrote.compiled.loops import run
from byrote.ops.dispatch import compilable


def gate_logits(streams: Tensor, keys: Tensor, gain: Tensor, eps: float) -> Tensor:
    chosen = _GateLogits.apply if compilable("memory_passes", streams) else plain_gate_logits
    return chosen(streams, keys, gain, eps)  # type: ignore[no-any-return]


def gated(gates: Tensor, value: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """u, columns"""
    chosen = _Gated.apply if compilable("memory_passes", value) else plain_gated
    return chosen(gates, value, gain, eps)  # type: ignore[no-any-return]


def convolve(columns: Tensor, taps: Tensor, documents: Tensor, dilation: int) -> Tensor:
    chosen = _Convolve.apply if compilable("memory_passes", columns) else plain_convolve
    return chosen(columns, taps, documents, dilation)  # type: ignore[no-any-return]


def plain_gate_logits(streams: Tensor, keys: Tensor, gain: Tensor, eps: float) -> Tensor:
    width = keys.shape[-1:]
    queries, keys = F.rms_norm(streams, width, None, eps), F.rms_norm(keys, width, None, eps)
    return (queries * (keys * gain)).sum(-1) / math.sqrt(width[0])


def plain_gated(gates: Tensor, value: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    # RMS(u) without a pass over u: all of a stream's u is one number times v.
    scale = gates * (gates.square() * value.square().mean(-1, keepdim=True) + eps).rsqrt()
    value = value[:, None]
    return gates[..., None] * value, scale[..., None] * value * gain


def plain_convolve(columns: Tensor, taps: Tensor, documents: Tensor, dilation: int) -> Tensor:
    """One shifted multiply-add per tap: a convolution kernel could not stop where a document starts."""
    behind, tokens = (len(taps) - 1) * dilation, len(columns)
    columns, before = F.pad(columns, (0, 0, 0, 0, behind, 0)), F.pad(documents, (behind, 0), value=-1)
    z = columns[behind:] * taps[-1]
    for tap in range(len(taps) - 1):
        place = slice(tap * dilation, tap * dilation + tokens)
        seen = columns[place] * (before[place] == documents)[:, None, None]
        z = torch.addcmul(z, seen, taps[tap])
    return z


class _GateLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, streams: Tensor, keys: Tensor, gain: Tensor, eps: float) -> Tensor:
        streams, keys, gain = streams.contiguous(), keys.contiguous(), gain.contiguous()
        logits, scales = streams.new_empty(streams.shape[:2]), streams.new_empty(*streams.shape[:2], 2)
        run(_loops().logits, streams, keys, gain, eps, logits, scales)
        ctx.save_for_backward(streams, keys, gain, logits, scales)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        to_streams, to_keys, to_gain = (torch.empty_like(tensor) for tensor in saved[:3])
        run(_loops().logits_backward, *saved, gradients[0].contiguous(), to_streams, to_keys, sums=[to_gain])
        return to_streams, to_keys, to_gain, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, value: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        gates, value, gain = gates.contiguous(), value.contiguous(), gain.contiguous()
        u = value.new_empty(*gates.shape, value.shape[1])
        columns = torch.empty_like(u)
        run(_loops().gated, gates, value, gain, eps, u, columns)
        ctx.save_for_backward(gates, value, gain)
        ctx.eps = eps
        return u, columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        to_u, to_columns = (gradient.contiguous() for gradient in gradients)
        to_gates, to_value, to_gain = (torch.empty_like(tensor) for tensor in saved)
        run(_loops().gated_backward, *saved, ctx.eps, to_u, to_columns, to_gates, to_value, sums=[to_gain])
        return to_gates, to_value, to_gain, None


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, taps: Tensor, documents: Tensor, dilation: int) -> Tensor:
        columns, taps, documents = columns.contiguous(), taps.contiguous(), documents.contiguous()
        z = torch.empty_like(columns)
        run(_loops().convolve, columns, taps, documents, dilation, z)
        ctx.save_for_backward(columns, taps, documents)
        ctx.dilation = dilation
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        columns, taps, documents = ctx.saved_tensors
        to_columns, to_taps = torch.empty_like(columns), torch.empty_like(taps)
        inputs = columns, taps, documents, ctx.dilation, gradients[0].contiguous()
        run(_loops().convolve_backward, *inputs, to_columns, sums=[to_taps])
        return to_columns, to_taps, None, None


def _loops() -> Any:
    from byrote.ops.loops import memory

    return memory
