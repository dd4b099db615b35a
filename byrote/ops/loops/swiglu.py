"""SwiGLU's product, compiled: one pass forward, one backward. `byrote.ops.swiglu` has the formula and the plain twin.

Gates and values come as flat arrays: the row of token t begins at t * pitch and is `width` long, so that both can lie
side by side in one array, where the values of a token begin at `up_at`.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
import numpy as np

from byrote.ops.loops.options import ONE, OPTIONS, TWO, UNIT, exp

LAYOUT = "int64, int64"


@numba.njit(f"void(int64, int64, {ONE}, {ONE}, {LAYOUT}, {ONE}, {TWO})", **OPTIONS)
def swiglu(begin, end, gates, ups, pitch, up_at, weight, out):
    width = out.shape[1]
    for t in range(begin, end):
        gate, up = gates[t * pitch : t * pitch + width], ups[t * pitch + up_at : t * pitch + up_at + width]
        share = weight[t]
        for c in range(width):
            out[t, c] = gate[c] / (UNIT + exp(-gate[c])) * up[c] * share


@numba.njit(
    f"void(int64, int64, {ONE}, {ONE}, {LAYOUT}, {ONE}, {TWO}, {ONE}, {ONE}, {ONE})",
    **OPTIONS,
)
def swiglu_backward(begin, end, gates, ups, pitch, up_at, weight, to_out, to_gates, to_ups, to_weight):
    width = to_out.shape[1]
    for t in range(begin, end):
        first, second = slice(t * pitch, t * pitch + width), slice(t * pitch + up_at, t * pitch + up_at + width)
        gate, up, to_gate, to_up = gates[first], ups[second], to_gates[first], to_ups[second]
        share, total = weight[t], np.float32(0)
        for c in range(width):
            sigmoid = UNIT / (UNIT + exp(-gate[c]))
            silu = gate[c] * sigmoid
            arrived = to_out[t, c]
            total += arrived * silu * up[c]
            to_up[c] = arrived * share * silu
            to_gate[c] = arrived * share * up[c] * sigmoid * (UNIT + gate[c] - silu)
        to_weight[t] = total
