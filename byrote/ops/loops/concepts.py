"""Boundaries, and how tokens read concepts, compiled: what stands between the projections of a step of decoding.

The loops behind `byrote.nn.boundary` and `byrote.nn.concept_attention`, which hold the formulas.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
import numpy as np

from byrote.ops.loops.attend import NOTHING, mix
from byrote.ops.loops.options import ONE, OPTIONS, THREE, TWO, UNIT

ZERO, HALF, LEAST = np.float32(0), np.float32(0.5), np.float32(1e-12)
IDS, FLAGS = "int64[:,::1]", "boolean[:,::1]"


@numba.njit(f"void(int64, int64, {THREE}, {THREE}, {TWO}, {FLAGS}, {FLAGS}, {TWO})", **OPTIONS)
def boundary(begin, end, query, key, tail, starts, alive, p):
    """p [B, T] of query and key [B, T, s]; tail [B, s] is the query before them."""
    width = query.shape[2]
    for b in range(begin, end):
        before = tail[b]
        for t in range(query.shape[1]):
            now = key[b, t]
            product, first, second = ZERO, ZERO, ZERO
            for c in range(width):
                product += before[c] * now[c]
                first += before[c] * before[c]
                second += now[c] * now[c]
            length = max(np.sqrt(first), LEAST) * max(np.sqrt(second), LEAST)
            # Written so that what is not a number stays.
            share = HALF - HALF * product / length
            share = ZERO if share < ZERO else UNIT if share > UNIT else share
            p[b, t] = ZERO if not alive[b, t] else UNIT if starts[b, t] else share
            before = query[b, t]


@numba.njit(
    f"void(int64, int64, {TWO}, {ONE}, float32, {TWO}, {TWO}, int64, int64, int64, int64, int64, "
    f"{ONE.replace('float32', 'int64')}, {ONE.replace('float32', 'int64')}, {IDS}, {IDS}, boolean, {TWO})",
    **OPTIONS,
)
def read(
    begin,
    end,
    query,
    gain,
    eps,
    keys,
    values,
    tokens,
    groups,
    slots,
    in_row,
    in_group,
    token_document,
    token_position,
    documents,
    positions,
    replicated,
    out,
):
    """out [N, H * n] of queries [N, H * n], normalized here head by head; `tokens` a row. Documents and positions of
    tokens [N], and of concepts [B, S]; a token that sees nothing gets 0.
    """
    n = keys.shape[1]
    heads = out.shape[1] // n
    weights, scores = np.empty(slots, np.float32), np.empty(slots, np.float32)
    normal = np.empty(n, np.float32)
    for t in range(begin, end):
        b = t // tokens
        document, position = token_document[t], token_position[t]
        for s in range(slots):
            weights[s] = NOTHING
            if documents[b, s] == document and positions[b, s] <= position:
                until = position + 1
                if s + 1 < slots and documents[b, s + 1] == document:
                    until = min(until, positions[b, s + 1])
                # A concept is the newest at its own token at least.
                weights[s] = np.log(np.float32(max(until - positions[b, s], 1))) if replicated else ZERO
        for h in range(heads):
            square = ZERO
            for c in range(n):
                square += query[t, h * n + c] * query[t, h * n + c]
            scale = UNIT / np.sqrt((square / np.float32(n) + eps) * np.float32(n))
            for c in range(n):
                normal[c] = query[t, h * n + c] * scale * gain[c]
            scores[:] = weights
            first = b * in_row + h * groups // heads * in_group
            mix(normal, scores, keys, values, first, out[t, h * n : h * n + n])
