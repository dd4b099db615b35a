"""The coefficients of a connection of four streams, 16 tokens at a time. `connect.py` imports this when it needs it.

z, and everything between it and pre, post and H, is laid out [24, 16]: a vector holds one number of 16 tokens.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import numpy as np

from byrote.compiled.loops import compiled
from byrote.compiled.vectors import LANES
from byrote.ops.loops.options import exp
from byrote.ops.loops.sinkhorn import _iterate, _unroll
from byrote.ops.loops.streams import N, _connect_backward, _dots, _read, _square

NUMBERS = N * (N + 2)
ONE, TWO, HALF = np.float32(1), np.float32(2), np.float32(0.5)
ARRAYS = {"three": "float32[:,:,::1]", "two": "float32[:,::1]", "one": "float32[::1]", "number": "float32"}


def _compiled(*arrays):
    kinds = ", ".join(ARRAYS.get(name, name) for name in arrays)
    return compiled(f"void(int64, int64, {kinds})", error_model="numpy")


@compiled(error_model="numpy")
def _group(m):
    return 0 if m < N else 1 if m < 2 * N else 2


@compiled(error_model="numpy")
def _tile(z, bias, scale, begin, end, tile):
    """tile <- scale z + bias of tokens [begin, end), at most 16; the lanes beyond repeat the last."""
    for m in range(NUMBERS):
        for lane in range(LANES):
            tile[m, lane] = scale[_group(m)] * z[min(begin + lane, end - 1), m] + bias[m]


@compiled(error_model="numpy")
def _shares(tile, shares):
    """P_ik: the softmax over new streams i of the logits at 2 N + N k + i, (old, new)."""
    for k in range(N):
        logits = tile[2 * N + N * k : 3 * N + N * k]
        for lane in range(LANES):
            most = max(max(logits[0, lane], logits[1, lane]), max(logits[2, lane], logits[3, lane]))
            for i in range(N):
                logits[i, lane] -= most
        for i in range(N):
            for lane in range(LANES):
                shares[i, k, lane] = exp(logits[i, lane])
        for lane in range(LANES):
            total = ONE / (shares[0, k, lane] + shares[1, k, lane] + shares[2, k, lane] + shares[3, k, lane])
            for i in range(N):
                shares[i, k, lane] *= total


@_compiled("three", "two", "one", "one", "number", "number", "int64", "two", "two", "two", "three")
def connect(begin, end, streams, z, bias, scale, norm_eps, eps, steps, x, pre, post, mix):
    """x, pre, post and H; z comes as weight vec X and is divided by the root of its mean square."""
    tile, scalings = np.empty((NUMBERS, LANES), np.float32), np.empty((steps + 2, N, LANES), np.float32)
    shares, squares = np.empty((N, N, LANES), np.float32), np.empty(N, np.float32)
    d = x.shape[1]
    for first in range(begin, end, LANES):
        count = min(LANES, end - first)
        for t in range(first, first + count):
            _square((streams[t].ctypes.data, squares.ctypes.data), 4 * d)
            square = (squares[0] + squares[1] + squares[2] + squares[3]) / np.float32(N * d)
            factor = ONE / np.sqrt(square + norm_eps)
            for m in range(NUMBERS):
                z[t, m] *= factor
        _tile(z, bias, scale, first, end, tile)
        for m in range(2 * N):
            for lane in range(LANES):
                tile[m, lane] = ONE / (ONE + exp(-tile[m, lane]))
        _shares(tile, shares)
        shares += eps
        _iterate(shares, scalings, steps, eps)
        for lane in range(count):
            t = first + lane
            for k in range(N):
                pre[t, k] = tile[k, lane] + eps
                post[t, k] = TWO * tile[N + k, lane]
                for i in range(N):
                    mix[t, i, k] = scalings[steps + 1, i, lane] * shares[i, k, lane] * scalings[steps, k, lane]
            _read((streams[t].ctypes.data, pre[t].ctypes.data, x[t].ctypes.data), 4 * d)


@_compiled(
    *("three", "one", "one", "two", "two", "two", "three", "number", "number", "int64"),
    *("two", "two", "three", "three", "three", "two", "one", "one"),
)
def connect_backward(
    begin,
    end,
    streams,
    bias,
    scale,
    z,
    pre,
    post,
    mix,
    norm_eps,
    eps,
    steps,
    to_x,
    to_post,
    to_mix,
    gradient,
    to_streams,
    to_z,
    to_bias,
    to_scale,
):
    """dX but for dz weight; dz of z = weight vec X; sums over tokens of bias's and of scale's gradient, 24 each."""
    tile, to_tile = np.empty((NUMBERS, LANES), np.float32), np.empty((NUMBERS, LANES), np.float32)
    scalings = np.empty((steps + 2, N, LANES), np.float32)
    shares, start = np.empty((N, N, LANES), np.float32), np.empty((N, N, LANES), np.float32)
    arrived, to_start = np.empty((N, N, LANES), np.float32), np.empty((N, N, LANES), np.float32)
    to_pre, shrink = np.empty((LANES, N), np.float32), np.empty((LANES, 1), np.float32)
    by_bias, by_scale = np.zeros((NUMBERS, LANES), np.float32), np.zeros((NUMBERS, LANES), np.float32)
    squares, factors = np.empty(N, np.float32), np.empty(LANES, np.float32)
    d = to_x.shape[1]
    for first in range(begin, end, LANES):
        count = min(LANES, end - first)
        for lane in range(count):
            t = first + lane
            _dots((streams[t].ctypes.data, to_x[t].ctypes.data, to_pre[lane].ctypes.data), 4 * d)
            _square((streams[t].ctypes.data, squares.ctypes.data), 4 * d)
            square = (squares[0] + squares[1] + squares[2] + squares[3]) / np.float32(N * d)
            factors[lane] = ONE / np.sqrt(square + norm_eps)
        _tile(z, bias, scale, first, end, tile)
        _shares(tile, shares)
        for i in range(N):
            for k in range(N):
                for lane in range(LANES):
                    start[i, k, lane] = shares[i, k, lane] + eps
                    arrived[i, k, lane] = to_mix[min(first + lane, end - 1), i, k]
        _iterate(start, scalings, steps, eps)
        _unroll(start, scalings, steps, eps, arrived, to_start)
        for k in range(N):
            for lane in range(LANES):
                mean = np.float32(0)
                for i in range(N):
                    mean += to_start[i, k, lane] * shares[i, k, lane]
                for i in range(N):
                    to_tile[2 * N + N * k + i, lane] = shares[i, k, lane] * (to_start[i, k, lane] - mean)
        for lane in range(LANES):
            for k in range(N):
                t = min(first + lane, end - 1)
                share, half = pre[t, k] - eps, HALF * post[t, k]
                to_tile[k, lane] = share * (ONE - share) * to_pre[min(lane, count - 1), k]
                to_tile[N + k, lane] = TWO * half * (ONE - half) * to_post[t, k]
        for lane in range(count):
            t, total = first + lane, np.float32(0)
            for m in range(NUMBERS):
                by_bias[m, lane] += to_tile[m, lane]
                by_scale[m, lane] += to_tile[m, lane] * z[t, m]
                passed = to_tile[m, lane] * scale[_group(m)]
                total += passed * z[t, m]
                to_z[t, m] = passed * factors[lane]
            shrink[lane, 0] = -total * factors[lane] * factors[lane] / np.float32(N * d)
            inputs = streams[t].ctypes.data, pre[t].ctypes.data, mix[t].ctypes.data, shrink[lane].ctypes.data
            outputs = to_x[t].ctypes.data, gradient[t].ctypes.data, to_streams[t].ctypes.data
            _connect_backward((*inputs, *outputs), 4 * d)
    for m in range(NUMBERS):
        for lane in range(LANES):
            to_bias[m] += by_bias[m, lane]
            to_scale[m] += by_scale[m, lane]
