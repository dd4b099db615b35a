"""The passes of a memory over its tokens, compiled; `byrote.ops.memory` has formulas, shapes and the plain twins."""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
import numpy as np

from byrote.ops.loops.options import OPTIONS, THREE, TWO, UNIT, exp


def _compiled(*arrays):
    return numba.njit(f"void(int64, int64, {', '.join(arrays)})", **OPTIONS)


@numba.njit(**OPTIONS)
def _logit(stream, key, gain, eps):
    """(s, 1 / RMS of the stream, 1 / RMS of the key)"""
    # A gate's root has a slope of up to 500 where s is near 0, which is where s is a small sum of large
    # terms: in float64 it is as exact as it can be.
    d = len(gain)
    query_square, key_square, product = np.float32(0), np.float32(0), 0.0
    for c in range(d):
        query_square += stream[c] * stream[c]
        key_square += key[c] * key[c]
    for c in range(d):
        product += np.float64(stream[c]) * key[c] * gain[c]
    query_scale = UNIT / np.sqrt(query_square / np.float32(d) + eps)
    key_scale = UNIT / np.sqrt(key_square / np.float32(d) + eps)
    return np.float32(product * query_scale * key_scale / np.sqrt(np.float32(d))), query_scale, key_scale


@_compiled(THREE, THREE, TWO, "float32", TWO, THREE)
def logits(begin, end, streams, keys, gain, eps, out, scales):
    for t in range(begin, end):
        for m in range(len(gain)):
            out[t, m], scales[t, m, 0], scales[t, m, 1] = _logit(streams[t, m], keys[t, m], gain[m], eps)


@_compiled(THREE, THREE, TWO, TWO, THREE, TWO, THREE, THREE, TWO)
def logits_backward(begin, end, streams, keys, gain, logits, scales, gradient, to_streams, to_keys, to_gain):
    n, d = gain.shape
    for t in range(begin, end):
        for m in range(n):
            query, key = scales[t, m, 0], scales[t, m, 1]
            each = gradient[t, m] * query * key / np.sqrt(np.float32(d))
            back = -gradient[t, m] * logits[t, m] / np.float32(d)
            to_query, to_key = back * query * query, back * key * key
            for c in range(d):
                to_streams[t, m, c] = each * keys[t, m, c] * gain[m, c] + to_query * streams[t, m, c]
            for c in range(d):
                to_keys[t, m, c] = each * streams[t, m, c] * gain[m, c] + to_key * keys[t, m, c]
            for c in range(d):
                to_gain[m, c] += each * streams[t, m, c] * keys[t, m, c]


@_compiled(TWO, TWO, TWO, "float32", THREE, THREE)
def gated(begin, end, gates, value, gain, eps, u, columns):
    n, d = gain.shape
    for t in range(begin, end):
        square = np.float32(0)
        for c in range(d):
            square += value[t, c] * value[t, c]
        square /= np.float32(d)
        for m in range(n):
            gate = gates[t, m]
            for c in range(d):
                u[t, m, c] = gate * value[t, c]
            gate /= np.sqrt(gate * gate * square + eps)
            for c in range(d):
                columns[t, m, c] = gate * value[t, c] * gain[m, c]


@_compiled(TWO, TWO, TWO, "float32", THREE, THREE, TWO, TWO, TWO)
def gated_backward(begin, end, gates, value, gain, eps, to_u, to_columns, to_gates, to_value, to_gain):
    n, d = gain.shape
    for t in range(begin, end):
        square, to_square = np.float32(0), np.float32(0)
        for c in range(d):
            square += value[t, c] * value[t, c]
            to_value[t, c] = 0
        square /= np.float32(d)
        for m in range(n):
            gate = gates[t, m]
            inverse = np.float32(1) / np.sqrt(gate * gate * square + eps)
            scale, direct, through = gate * inverse, np.float32(0), np.float32(0)
            for c in range(d):
                direct += to_u[t, m, c] * value[t, c]
            for c in range(d):
                through += to_columns[t, m, c] * value[t, c] * gain[m, c]
            # scale = gate (gate^2 square + eps)^(-1/2), of which gate and square are variables
            through *= inverse * inverse * inverse
            to_gates[t, m] = direct + through * eps
            to_square -= through * gate * gate * gate / np.float32(2)
            for c in range(d):
                to_value[t, c] += gate * to_u[t, m, c]
            for c in range(d):
                to_value[t, c] += scale * to_columns[t, m, c] * gain[m, c]
            for c in range(d):
                to_gain[m, c] += scale * to_columns[t, m, c] * value[t, c]
        to_square *= np.float32(2) / np.float32(d)
        for c in range(d):
            to_value[t, c] += to_square * value[t, c]


@_compiled(THREE, THREE, "int64[::1]", "int64", THREE)
def convolve(begin, end, columns, taps, documents, dilation, z):
    n, d = columns.shape[1:]
    last = len(taps) - 1
    for t in range(begin, end):
        for m in range(n):
            for c in range(d):
                z[t, m, c] = columns[t, m, c] * taps[last, m, c]
            for i in range(last):
                r = t - (last - i) * dilation
                if r >= 0 and documents[r] == documents[t]:
                    for c in range(d):
                        z[t, m, c] += columns[r, m, c] * taps[i, m, c]


@_compiled(THREE, THREE, "int64[::1]", "int64", THREE, THREE, THREE)
def convolve_backward(begin, end, columns, taps, documents, dilation, to_z, to_columns, to_taps):
    n, d = columns.shape[1:]
    last = len(taps) - 1
    for t in range(begin, end):  # what arrives at t, from the tokens that see it
        for m in range(n):
            for c in range(d):
                to_columns[t, m, c] = taps[last, m, c] * to_z[t, m, c]
            for c in range(d):
                to_taps[last, m, c] += columns[t, m, c] * to_z[t, m, c]
            for i in range(last):
                s = t + (last - i) * dilation
                if s < len(documents) and documents[s] == documents[t]:
                    for c in range(d):
                        to_columns[t, m, c] += taps[i, m, c] * to_z[s, m, c]
                    for c in range(d):
                        to_taps[i, m, c] += columns[t, m, c] * to_z[s, m, c]


@numba.njit(
    f"void(int64, int64, {THREE}, {THREE}, {TWO}, {TWO}, {TWO}, {THREE}, int64, {THREE}, boolean[::1], "
    f"boolean[::1], boolean, float32, float32, {THREE}, {TWO})",
    **OPTIONS,
)
def step(
    begin, end, streams, keys, value, gain, conv_gain, weight, dilation, tail, alive, starts,
    copysign, eps, conv_eps, addend, columns,
):  # fmt: skip
    """All of a layer for one token a row, from its keys and value: weight [n, d, K], tail [B, L, n d], newest last."""
    n, d, taps = weight.shape
    for row in range(begin, end):
        square = np.float32(0)
        for c in range(d):
            square += value[row, c] * value[row, c]
        square /= np.float32(d)
        seen = taps if alive[row] and not starts[row] else 1
        for m in range(n):
            logit, _, _ = _logit(streams[row, m], keys[row, m], gain[m], eps)
            size = abs(logit)
            signed = np.copysign(np.sqrt(np.float32(1e-6) if size < np.float32(1e-6) else size), logit)
            if logit == 0 and not copysign:
                signed = np.float32(0)
            gate = UNIT / (UNIT + exp(-signed)) if alive[row] else np.float32(0)
            scale = gate / np.sqrt(gate * gate * square + conv_eps)
            for c in range(d):
                place = m * d + c
                column = scale * value[row, c] * conv_gain[m, c]
                columns[row, place] = column
                z = column * weight[m, c, taps - 1]
                for back in range(1, seen):
                    z += tail[row, tail.shape[1] - back * dilation, place] * weight[m, c, taps - 1 - back]
                addend[row, m, c] = gate * value[row, c] + z / (UNIT + exp(-z))
