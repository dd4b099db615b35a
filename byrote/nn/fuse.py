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
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from byrote.compiled import compilable, run


def gate_logits(streams: Tensor, keys: Tensor, gain: Tensor, eps: float) -> Tensor:
    chosen = _GateLogits.apply if compilable(streams) else plain_gate_logits
    return chosen(streams, keys, gain, eps)  # type: ignore[no-any-return]


def gated(gates: Tensor, value: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """u, columns"""
    chosen = _Gated.apply if compilable(value) else plain_gated
    return chosen(gates, value, gain, eps)  # type: ignore[no-any-return]


def convolve(columns: Tensor, taps: Tensor, documents: Tensor, dilation: int) -> Tensor:
    chosen = _Convolve.apply if compilable(columns) else plain_convolve
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
        run(_kernels()[0], streams, keys, gain, eps, logits, scales)
        ctx.save_for_backward(streams, keys, gain, logits, scales)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        to_streams, to_keys, to_gain = (torch.empty_like(tensor) for tensor in saved[:3])
        run(_kernels()[1], *saved, gradients[0].contiguous(), to_streams, to_keys, sums=[to_gain])
        return to_streams, to_keys, to_gain, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, value: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        gates, value, gain = gates.contiguous(), value.contiguous(), gain.contiguous()
        u = value.new_empty(*gates.shape, value.shape[1])
        columns = torch.empty_like(u)
        run(_kernels()[2], gates, value, gain, eps, u, columns)
        ctx.save_for_backward(gates, value, gain)
        ctx.eps = eps
        return u, columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        to_u, to_columns = (gradient.contiguous() for gradient in gradients)
        to_gates, to_value, to_gain = (torch.empty_like(tensor) for tensor in saved)
        run(_kernels()[3], *saved, ctx.eps, to_u, to_columns, to_gates, to_value, sums=[to_gain])
        return to_gates, to_value, to_gain, None


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, taps: Tensor, documents: Tensor, dilation: int) -> Tensor:
        columns, taps, documents = columns.contiguous(), taps.contiguous(), documents.contiguous()
        z = torch.empty_like(columns)
        run(_kernels()[4], columns, taps, documents, dilation, z)
        ctx.save_for_backward(columns, taps, documents)
        ctx.dilation = dilation
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        columns, taps, documents = ctx.saved_tensors
        to_columns, to_taps = torch.empty_like(columns), torch.empty_like(taps)
        inputs = columns, taps, documents, ctx.dilation, gradients[0].contiguous()
        run(_kernels()[5], *inputs, to_columns, sums=[to_taps])
        return to_columns, to_taps, None, None


@cache
def _kernels() -> tuple[Callable[..., None], ...]:
    """Of each function above, forward and backward; compiled at first use and kept on disk."""
    import numpy as np
    from numba import njit

    # As in byrote.nn.mix: sums may be reordered, NaN and infinity stay; few arrays in each inner loop.
    options: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"reassoc", "contract", "nsz"}}
    three, two, many = "float32[:,:,::1]", "float32[:,::1]", "int64[::1]"

    def compiled(*arrays: str) -> Any:
        return njit(f"void(int64, int64, {', '.join(arrays)})", **options)

    @compiled(three, three, two, "float32", two, three)
    def logits(begin, end, streams, keys, gain, eps, out, scales):
        n, d = gain.shape
        for t in range(begin, end):
            for m in range(n):
                # A gate's root has a slope of up to 500 where s is near 0, which is where s is a small sum of large
                # terms: in float64 it is as exact as it can be.
                query, key, product = np.float32(0), np.float32(0), 0.0
                for c in range(d):
                    query += streams[t, m, c] * streams[t, m, c]
                    key += keys[t, m, c] * keys[t, m, c]
                for c in range(d):
                    product += np.float64(streams[t, m, c]) * keys[t, m, c] * gain[m, c]
                query = np.float32(1) / np.sqrt(query / np.float32(d) + eps)
                key = np.float32(1) / np.sqrt(key / np.float32(d) + eps)
                scales[t, m, 0], scales[t, m, 1] = query, key
                out[t, m] = product * query * key / np.sqrt(np.float32(d))

    @compiled(three, three, two, two, three, two, three, three, two)
    def logits_backward(begin, end, streams, keys, gain, logits, scales, gradient, to_streams, to_keys, to_gain):
        n, d = gain.shape
        for t in range(begin, end):
            for m in range(n):
                query, key = scales[t, m, 0], scales[t, m, 1]
                each = gradient[t, m] * query * key / np.sqrt(np.float32(d))
                back = -gradient[t, m] * logits[t, m] / np.float32(d)
                to_query, to_key = back * query * query, back * key * key
                for c in range(d):
                    to_streams[t, m, c] = each * keys[t, m, c] * gain[m, c] + to_query * streams[t, m, c]
                for c in range(d):
                    to_keys[t, m, c] = each * streams[t, m, c] * gain[m, c] + to_key * keys[t, m, c]
                for c in range(d):
                    to_gain[m, c] += each * streams[t, m, c] * keys[t, m, c]

    @compiled(two, two, two, "float32", three, three)
    def gated(begin, end, gates, value, gain, eps, u, columns):
        n, d = gain.shape
        for t in range(begin, end):
            square = np.float32(0)
            for c in range(d):
                square += value[t, c] * value[t, c]
            square /= np.float32(d)
            for m in range(n):
                gate = gates[t, m]
                for c in range(d):
                    u[t, m, c] = gate * value[t, c]
                gate /= np.sqrt(gate * gate * square + eps)
                for c in range(d):
                    columns[t, m, c] = gate * value[t, c] * gain[m, c]

    @compiled(two, two, two, "float32", three, three, two, two, two)
    def gated_backward(begin, end, gates, value, gain, eps, to_u, to_columns, to_gates, to_value, to_gain):
        n, d = gain.shape
        for t in range(begin, end):
            square, to_square = np.float32(0), np.float32(0)
            for c in range(d):
                square += value[t, c] * value[t, c]
                to_value[t, c] = 0
            square /= np.float32(d)
            for m in range(n):
                gate = gates[t, m]
                inverse = np.float32(1) / np.sqrt(gate * gate * square + eps)
                scale, direct, through = gate * inverse, np.float32(0), np.float32(0)
                for c in range(d):
                    direct += to_u[t, m, c] * value[t, c]
                for c in range(d):
                    through += to_columns[t, m, c] * value[t, c] * gain[m, c]
                # scale = gate (gate^2 square + eps)^(-1/2), of which gate and square are variables
                through *= inverse * inverse * inverse
                to_gates[t, m] = direct + through * eps
                to_square -= through * gate * gate * gate / np.float32(2)
                for c in range(d):
                    to_value[t, c] += gate * to_u[t, m, c]
                for c in range(d):
                    to_value[t, c] += scale * to_columns[t, m, c] * gain[m, c]
                for c in range(d):
                    to_gain[m, c] += scale * to_columns[t, m, c] * value[t, c]
            to_square *= np.float32(2) / np.float32(d)
            for c in range(d):
                to_value[t, c] += to_square * value[t, c]

    @compiled(three, three, many, "int64", three)
    def convolve(begin, end, columns, taps, documents, dilation, z):
        n, d = columns.shape[1:]
        last = len(taps) - 1
        for t in range(begin, end):
            for m in range(n):
                for c in range(d):
                    z[t, m, c] = columns[t, m, c] * taps[last, m, c]
                for i in range(last):
                    r = t - (last - i) * dilation
                    if r >= 0 and documents[r] == documents[t]:
                        for c in range(d):
                            z[t, m, c] += columns[r, m, c] * taps[i, m, c]

    @compiled(three, three, many, "int64", three, three, three)
    def convolve_backward(begin, end, columns, taps, documents, dilation, to_z, to_columns, to_taps):
        n, d = columns.shape[1:]
        last = len(taps) - 1
        for t in range(begin, end):  # what arrives at t, from the tokens that see it
            for m in range(n):
                for c in range(d):
                    to_columns[t, m, c] = taps[last, m, c] * to_z[t, m, c]
                for c in range(d):
                    to_taps[last, m, c] += columns[t, m, c] * to_z[t, m, c]
                for i in range(last):
                    s = t + (last - i) * dilation
                    if s < len(documents) and documents[s] == documents[t]:
                        for c in range(d):
                            to_columns[t, m, c] += taps[i, m, c] * to_z[s, m, c]
                        for c in range(d):
                            to_taps[i, m, c] += columns[t, m, c] * to_z[s, m, c]

    return logits, logits_backward, gated, gated_backward, convolve, convolve_backward
