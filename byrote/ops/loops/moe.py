"""Routing and experts of the few tokens of a step of decoding, compiled: calls cost more than products there."""

# No `from __future__ import annotations` here: numba reads the signatures.
import numpy as np

from byrote.compiled.loops import compiled
from byrote.ops.loops.options import ONE, OPTIONS, THREE, TWO, UNIT, exp


@compiled(**OPTIONS)
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


@compiled(**OPTIONS)
def _largest(scores):
    """The place of the largest, of equal ones the first; as torch has it, what is not a number is larger than all."""
    place = 0
    for e in range(1, len(scores)):
        if scores[e] > scores[place] or (scores[e] != scores[e] and scores[place] == scores[place]):
            place = e
    return place


@compiled(
    f"void(int64, int64, {TWO}, {TWO}, {ONE}, int64, boolean, float32, {THREE}, {THREE}, {TWO}, {TWO}, {TWO}, {TWO})",
    **OPTIONS,
)
def moe(begin, end, x, router, bias, k, renormalize, route_scale, gate_up, down, gate_s, up_s, down_s, out):
    """All of a layer with sigmoid scores and one group; the shared expert may be 0 wide."""
    number, width = len(bias), down.shape[2]
    scores, biased = np.empty(number, np.float32), np.empty(number, np.float32)
    ids, hidden = np.empty(k, np.int64), np.empty(max(width, len(gate_s)), np.float32)
    for t in range(begin, end):
        for e in range(number):
            logit = np.float32(0)
            for c in range(x.shape[1]):
                logit += router[e, c] * x[t, c]
            scores[e] = UNIT / (UNIT + exp(-logit))
            biased[e] = scores[e] + bias[e]
        total = np.float32(1e-20)
        for i in range(k):
            ids[i] = _largest(biased)
            biased[ids[i]] = -np.float32(np.inf)
            total += scores[ids[i]]
        share = route_scale / total if renormalize else route_scale
        out[t] = 0
        for i in range(k):
            e = ids[i]
            _swiglu_layer(x[t], gate_up[e, :width], gate_up[e, width:], down[e], scores[e] * share, hidden, out[t])
        if len(gate_s):
            _swiglu_layer(x[t], gate_s, up_s, down_s, UNIT, hidden, out[t])
