"""Attention of the few queries of a step of decoding, compiled, between the projections of `byrote.nn.gqa`.

N = B T tokens of B rows; H heads of queries in G groups, n wide; S keys a row. Keys and values lie somewhere in memory,
[X, n]: slot s of group g of row b is line b * in_row + g * in_group + s.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
import numpy as np

from byrote.ops.loops.options import OPTIONS, TWO, UNIT, exp

NOTHING = np.float32(-np.inf)


@numba.njit(f"void(int64, int64, {TWO}, {TWO}, complex64[:,::1], {TWO}, {TWO})", **OPTIONS)
def turn(begin, end, query, key, turns, turned_query, turned_key):
    """Rotate the pairs of query [N, H * n] and key [N, G * n] by turns [N, n / 2]."""
    half = turns.shape[1]
    for t in range(begin, end):
        for x, out in ((query[t], turned_query[t]), (key[t], turned_key[t])):
            for at in range(0, len(x), 2 * half):
                for i in range(half):
                    first, second = x[at + 2 * i], x[at + 2 * i + 1]
                    real, imaginary = turns[t, i].real, turns[t, i].imag
                    out[at + 2 * i] = first * real - second * imaginary
                    out[at + 2 * i + 1] = first * imaginary + second * real


@numba.njit(inline="always")
def mix(query, scores, keys, values, first, out):
    """out = softmax(query . keys + scores) over the values that begin at row `first`; nothing of what has -inf."""
    n, slots, most = keys.shape[1], len(scores), NOTHING
    for s in range(slots):
        key, total = keys[first + s], np.float32(0)
        for c in range(n):
            total += query[c] * key[c]
        scores[s] += total
    for s in range(slots):
        if not scores[s] <= most:  # what is not a number stays
            most = scores[s]
    for c in range(n):
        out[c] = 0
    if most == NOTHING:
        return
    whole = np.float32(0)
    for s in range(slots):
        share = exp(scores[s] - most) * np.float32(scores[s] != NOTHING)
        scores[s] = share
        whole += share
    whole = UNIT / whole
    for s in range(slots):
        value, share = values[first + s], scores[s] * whole
        for c in range(n):
            out[c] += share * value[c]


@numba.njit(
    f"void(int64, int64, {TWO}, {TWO}, {TWO}, int64, int64, int64, int64, int64, boolean[:,::1], {TWO})",
    **OPTIONS,
)
def attend(begin, end, query, keys, values, tokens, groups, slots, in_row, in_group, seen, out):
    """out [N, H * n] of query [N, H * n]; `tokens` a row. `seen` [N, S] is true where a token may look, [N, 0] means
    everywhere; where it may look nowhere out is 0.
    """
    n = keys.shape[1]
    heads = out.shape[1] // n
    scores = np.empty(slots, np.float32)
    scale = UNIT / np.sqrt(np.float32(n))
    scaled = np.empty(n, np.float32)
    for t in range(begin, end):
        for h in range(heads):
            for c in range(n):
                scaled[c] = query[t, h * n + c] * scale
            if seen.shape[1]:
                for s in range(slots):
                    scores[s] = np.float32(0) if seen[t, s] else NOTHING
            else:
                scores[:] = 0
            first = t // tokens * in_row + h * groups // heads * in_group
            mix(scaled, scores, keys, values, first, out[t, h * n : h * n + n])
