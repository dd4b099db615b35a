"""Routing and experts of the few tokens of a step of decoding, compiled: calls cost more than products there."""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
import numpy as np

from byrote.ops.loops.options import ONE, OPTIONS, THREE, TWO, UNIT, exp
from byrote.ops.loops.top_k import top_k


@numba.njit(**OPTIONS)
def _swiglu_layer(x, gate_matrix, up_matrix, down_matrix, weight, hidden, out):
    """out += weight down (silu(gate x) * up x)"""
    width, d = gate_matrix.shape
    for w in range(width):
        gate, up = np.float32(0), np.float32(0)
        for c in range(d):
            gate += gate_matrix[w, c] * x[c]
        for c in range(d):
            up += up_matrix[w, c] * x[c]
        hidden[w] = gate / (UNIT + exp(-gate)) * up * weight
    for c in range(d):
        total = np.float32(0)
        for w in range(width):
            total += down_matrix[c, w] * hidden[w]
        out[c] += total


@numba.njit(f"void(int64, int64, {TWO}, {TWO}, {TWO}, {TWO}, {TWO})", **OPTIONS)
def mlp(begin, end, x, gate, up, down, out):
    hidden = np.empty(len(gate), np.float32)
    for t in range(begin, end):
        out[t] = 0
        _swiglu_layer(x[t], gate, up, down, UNIT, hidden, out[t])


@numba.njit(f"void(int64, int64, {TWO}, int64[:,::1], {TWO}, {THREE}, {THREE}, {TWO})", **OPTIONS)
def experts(begin, end, x, ids, gates, gate_up, down, out):
    """out_t = sum_k gates_tk down_e (silu(gate_e x_t) * up_e x_t), e = ids_tk."""
    width = down.shape[2]
    hidden = np.empty(width, np.float32)
    for t in range(begin, end):
        out[t] = 0
        for k in range(ids.shape[1]):
            e = ids[t, k]
            _swiglu_layer(x[t], gate_up[e, :width], gate_up[e, width:], down[e], gates[t, k], hidden, out[t])


@numba.njit(
    f"void(int64, int64, {TWO}, {TWO}, {ONE}, int64, boolean, float32, {THREE}, {THREE}, {TWO}, {TWO}, {TWO}, {TWO})",
    **OPTIONS,
)
def moe(begin, end, x, router, bias, k, renormalize, route_scale, gate_up, down, gate_s, up_s, down_s, out):
    """All of a layer with sigmoid scores and one group; the shared expert may be 0 wide."""
    number, width = len(bias), down.shape[2]
    scores, biased = np.empty(number, np.float32), np.empty((1, number), np.float32)
    ids, hidden = np.empty((1, k), np.int64), np.empty(max(width, len(gate_s)), np.float32)
    for t in range(begin, end):
        for e in range(number):
            logit = np.float32(0)
            for c in range(x.shape[1]):
                logit += router[e, c] * x[t, c]
            scores[e] = UNIT / (UNIT + exp(-logit))
            biased[0, e] = scores[e] + bias[e]
        top_k(0, 1, biased, ids)
        total = np.float32(1e-20)
        for i in range(k):
            total += scores[ids[0, i]]
        share = route_scale / total if renormalize else route_scale
        out[t] = 0
        for i in range(k):
            e = ids[0, i]
            _swiglu_layer(x[t], gate_up[e, :width], gate_up[e, width:], down[e], scores[e] * share, hidden, out[t])
        if len(gate_s):
            _swiglu_layer(x[t], gate_s, up_s, down_s, UNIT, hidden, out[t])
