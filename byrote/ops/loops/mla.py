"""Absorbed latent attention of one token a row, compiled: what stands between the projections of `byrote.nn.mla`.

Shapes: B rows, S cached tokens, H heads; n positionless and r rotary dimensions of a query, v of a value, c of the
latent. `up` [H * (n + v), c] is the matrix of W_UK and W_UV, head by head.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
import numpy as np

from byrote.ops.loops.options import ONE, OPTIONS, THREE, TWO, UNIT, exp


@numba.njit(nogil=True, cache=True, inline="always")
def _rotate(x, at, turns, out):
    for i in range(len(turns)):
        real, imaginary = x[at + 2 * i], x[at + 2 * i + 1]
        out[2 * i] = real * turns[i, 0] - imaginary * turns[i, 1]
        out[2 * i + 1] = real * turns[i, 1] + imaginary * turns[i, 0]


@numba.njit(inline="always", **OPTIONS)
def _dot(x, y):
    total = np.float32(0)
    for j in range(len(x)):
        total += x[j] * y[j]
    return total


@numba.njit(inline="always", **OPTIONS)
def _four(x, rows, s):
    """Products of x with four rows from s on."""
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for j in range(len(x)):
        a += x[j] * rows[s, j]
        b += x[j] * rows[s + 1, j]
        c += x[j] * rows[s + 2, j]
        d += x[j] * rows[s + 3, j]
    return a, b, c, d


@numba.njit(
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


@numba.njit(
    f"void(int64, int64, {THREE}, {THREE}, {THREE}, {THREE}, boolean[:,::1], float32, {TWO}, {TWO})",
    **OPTIONS,
)
def attend(begin, end, query, rope_query, latents, rope_keys, seen, scale, up, out):
    """out [B, H * v] of the queries over latents [B, S, c] and rotary keys [B, S, r].

    `seen` [B, S] is true where a token may look; [B, 0] means everywhere.
    """
    heads, c = query.shape[1:]
    keys = rope_keys.shape[1]
    fours = keys - keys % 4  # four keys while a number of the query, or of the sum, is in its register
    v, both = out.shape[1] // heads, len(up) // heads
    scores, mixed = np.empty(keys, np.float32), np.empty(c, np.float32)
    for t in range(begin, end):
        latent, rope_key = latents[t], rope_keys[t]
        if seen.shape[1] and not seen[t].any():
            out[t] = 0
            continue
        for h in range(heads):
            for s in range(0, fours, 4):
                s0, s1, s2, s3 = _four(query[t, h], latent, s)
                r0, r1, r2, r3 = _four(rope_query[t, h], rope_key, s)
                scores[s], scores[s + 1], scores[s + 2], scores[s + 3] = s0 + r0, s1 + r1, s2 + r2, s3 + r3
            for s in range(fours, keys):
                scores[s] = _dot(query[t, h], latent[s]) + _dot(rope_query[t, h], rope_key[s])
            most = -np.float32(np.inf)
            for s in range(keys):
                if seen.shape[1] and not seen[t, s]:
                    scores[s] = -np.float32(np.inf)
                scores[s] *= scale
                most = max(most, scores[s])
            total = np.float32(0)
            for s in range(keys):
                scores[s] = exp(scores[s] - most) if scores[s] != -np.float32(np.inf) else np.float32(0)
                total += scores[s]
            mixed[:] = 0
            for s in range(0, fours, 4):
                s0, s1, s2, s3 = scores[s], scores[s + 1], scores[s + 2], scores[s + 3]
                for j in range(c):
                    first = s0 * latent[s, j] + s1 * latent[s + 1, j]
                    mixed[j] += first + (s2 * latent[s + 2, j] + s3 * latent[s + 3, j])
            for s in range(fours, keys):
                for j in range(c):
                    mixed[j] += scores[s] * latent[s, j]
            for i in range(v):
                out[t, h * v + i] = _dot(up[h * both + both - v + i], mixed) / total
