"""Experts of the few tokens of a step of decoding, compiled, whose cost is the number of operations, not of numbers."""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
import numpy as np

from byrote.nn.kernels.options import OPTIONS, THREE, TWO, UNIT, exp


@numba.njit(
    f"void(int64, int64, {TWO}, int64[:,::1], {TWO}, {THREE}, {THREE}, {TWO})",
    **OPTIONS,
)
def experts(begin, end, x, ids, gates, gate_up, down, out):
    """out_t = sum_k gates_tk down_e (silu(gate_e x_t) * up_e x_t), e = ids_tk."""
    d, width = x.shape[1], down.shape[2]
    hidden = np.empty(width, np.float32)
    for t in range(begin, end):
        out[t] = 0
        for k in range(ids.shape[1]):
            e = ids[t, k]
            for w in range(width):
                gate, up = np.float32(0), np.float32(0)
                for c in range(d):
                    gate += gate_up[e, w, c] * x[t, c]
                for c in range(d):
                    up += gate_up[e, width + w, c] * x[t, c]
                hidden[w] = gate / (UNIT + exp(-gate)) * up * gates[t, k]
            for c in range(d):
                total = np.float32(0)
                for w in range(width):
                    total += down[e, c, w] * hidden[w]
                out[t, c] += total
