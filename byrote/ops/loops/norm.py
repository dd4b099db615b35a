"""RMSNorm, compiled: one pass over a token where torch has five operations. `byrote.nn.norm` has the plain twin."""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
import numpy as np

from byrote.ops.loops.options import ONE, OPTIONS, TWO, UNIT


@numba.njit(f"void(int64, int64, {TWO}, {ONE}, float32, {TWO}, {ONE})", **OPTIONS)
def normalize(begin, end, x, weight, eps, out, scales):
    """out_t = scales_t x_t weight, scales_t = 1 / sqrt(mean(x_t^2) + eps)"""
    d = len(weight)
    for t in range(begin, end):
        square = np.float32(0)
        for c in range(d):
            square += x[t, c] * x[t, c]
        scales[t] = scale = UNIT / np.sqrt(square / np.float32(d) + eps)
        for c in range(d):
            out[t, c] = x[t, c] * scale * weight[c]


@numba.njit(f"void(int64, int64, {TWO}, {ONE}, {ONE}, {TWO}, {TWO}, {ONE})", **OPTIONS)
def normalize_backward(begin, end, x, weight, scales, to_out, to_x, to_weight):
    d = len(weight)
    for t in range(begin, end):
        scale, along = scales[t], np.float32(0)
        for c in range(d):
            along += to_out[t, c] * weight[c] * x[t, c]
        along *= scale * scale / np.float32(d)
        for c in range(d):
            to_x[t, c] = scale * (to_out[t, c] * weight[c] - along * x[t, c])
        for c in range(d):
            to_weight[c] += scale * to_out[t, c] * x[t, c]
