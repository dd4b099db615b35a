"""Between the projections of absorbed latent attention, one token a row, compiled. See `byrote.nn.mla`.

Shapes: B rows, H heads; n positionless and r rotary dimensions of a query, v of a value, c of the
latent. `up` [H * (n + v), c] is the matrix of W_UK and W_UV, head by head.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import numpy as np

from byrote.compiled.loops import compiled
from byrote.ops.loops.options import ONE, OPTIONS, THREE, TWO, UNIT


@compiled(inline="always")
def _rotate(x, at, turns, out):
    for i in range(len(turns)):
        real, imaginary = x[at + 2 * i], x[at + 2 * i + 1]
        out[2 * i] = real * turns[i, 0] - imaginary * turns[i, 1]
        out[2 * i + 1] = real * turns[i, 1] + imaginary * turns[i, 0]


@compiled(
    f"void(int64, int64, {TWO}, {TWO}, {THREE}, {ONE}, float32, {TWO}, {THREE}, {THREE}, {TWO}, {TWO})",
    **OPTIONS,
)
def enter(begin, end, queries, keys, turns, weight, eps, up, query, rope_query, latent, rope_key):
    """From the projections [B, H * (n + r)] and [B, c + r]: queries of latents [B, H, c] and of rotary keys [B, H, r],
    the latents [B, c], normalized by `weight` and `eps`, and the rotary keys [B, r].
    """
    heads, c = query.shape[1:]
    r = rope_key.shape[1]
    n = queries.shape[1] // heads - r
    both = len(up) // heads
    for t in range(begin, end):
        for h in range(heads):
            at = h * (n + r)
            query[t, h] = 0
            for i in range(n):
                number, row = queries[t, at + i], up[h * both + i]
                for j in range(c):
                    query[t, h, j] += number * row[j]
            _rotate(queries[t], at + n, turns[t], rope_query[t, h])
        square = np.float32(0)
        for j in range(c):
            square += keys[t, j] * keys[t, j]
        scale = UNIT / np.sqrt(square / np.float32(c) + eps)
        for j in range(c):
            latent[t, j] = keys[t, j] * scale * weight[j]
        _rotate(keys[t], c, turns[t], rope_key[t])
