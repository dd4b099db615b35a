"""Windows and hash of `hashing.py` as compiled loops, which imports this file when it first needs them.

Remainders by multiplication (Barrett): for 0 <= u < 2^63 and a prime p, with m = floor(2^64 / p),

    q = floor(u m / 2^64)      is floor(u / p) or one less, as u (1/p - m / 2^64) < 1
    r = u - q p                is u mod p, or that plus p

A negative x has the floor remainder p - 1 - (~x mod p). A division takes several times as long.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from byrote.address.spec import DEAD
from byrote.compiled.loops import compiled


@intrinsic
def _high(typingctx, a, b):
    """The upper half of the product of two uint64."""

    def generate(context, builder, signature, arguments):
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(factor, wide) for factor in arguments))
        return builder.trunc(builder.lshr(product, wide(64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@compiled(error_model="numpy")
def hash_windows(windows, multipliers, primes, offsets, pad_id, out):
    """out [M, (N - 1) K] for windows [M, N], multipliers [N], primes [N - 1, K], offsets [(N - 1) K]; all int64."""
    orders, heads = primes.shape
    inverses = np.empty((orders, heads), np.uint64)
    for order in range(orders):
        for head in range(heads):
            p = np.uint64(primes[order, head])
            last = ~np.uint64(0)  # 2^64 - 1: its quotient is that of 2^64, which no odd prime divides
            inverses[order, head] = last // p
    for i in range(windows.shape[0]):
        token = windows[i, 0]
        mix = (pad_id if token == DEAD else token) * multipliers[0]
        for order in range(orders):
            token = windows[i, order + 1]
            mix ^= (pad_id if token == DEAD else token) * multipliers[order + 1]
            sign = mix >> 63  # 0, or -1 where negative
            u = mix ^ sign
            for head in range(heads):
                column, p = order * heads + head, primes[order, head]
                q = np.int64(_high(np.uint64(u), inverses[order, head]))  # type: ignore[call-arg]
                r = u - q * p
                r -= p if r >= p else 0
                out[i, column] = (r ^ sign) + (p & sign) + offsets[column]


@compiled()
def canonical_ids(vocabulary, ids, alive, out):
    """out [M] for ids and alive [M], which may be empty: all are; whether all living ids are in the vocabulary."""
    known = True
    for i in range(len(ids)):
        if len(alive) and not alive[i]:
            out[i] = DEAD
        elif ids[i] < 0 or ids[i] >= len(vocabulary):
            known = False
        else:
            out[i] = vocabulary[ids[i]]
    return known


@compiled()
def windows(ids, starts, tail, out):
    """out [B, T, N] for ids and starts [B, T] and the tail [B, N - 1]; a token walks back until its document ends."""
    rows, tokens, order = out.shape
    for row in range(rows):
        for t in range(tokens):
            here = out[row, t, 0] = ids[row, t]
            open_end = here != DEAD and not starts[row, t]
            for back in range(1, order):
                if open_end and t >= back:
                    seen = ids[row, t - back]
                    out[row, t, back] = seen
                    open_end = seen != DEAD and not starts[row, t - back]
                elif open_end:
                    seen = tail[row, order - 1 + t - back]
                    out[row, t, back] = seen
                    open_end = seen != DEAD
                else:
                    out[row, t, back] = DEAD
