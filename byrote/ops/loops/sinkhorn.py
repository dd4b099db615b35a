"""Sinkhorn of 4 x 4 matrices as compiled loops, 16 tokens at a time. `sinkhorn.py` imports this file when it needs it.

H = diag(u) P diag(v): a step changes one of the two vectors, and P stays in the first cache over all steps.

    u_i <- u_i / s_i,  s_i = u_i w_i + eps,  w_i = sum_k P_ik v_k       (rows; columns likewise, with v)

Backward of a step, from du' of the new u' = u / s:

    dw = -u'^2 du',  du = eps (u' / u)^2 du',  dP_ik += dw_i v_k,  dv_k += sum_i P_ik dw_i

eps must be large enough (1e-7) that no entry of P, and so no u and v, leaves the range of float32.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from byrote.compiled.loops import compiled
from byrote.compiled.vectors import LANES, load, splat, store

N = 4
F32 = ir.FloatType()
FUSED = ("contract",)  # a product and a sum may be one operation


def _at(builder, base, index):
    return builder.add(base, ir.IntType(64)(4 * LANES * index))


def _place(i, k, rows):
    return N * i + k if rows else N * k + i


def _step(rows):
    """An intrinsic (P, old, other, new, eps): one step, on vectors of `LANES` tokens."""

    @intrinsic
    def step(typingctx, matrix, old, other, new, eps):
        def generate(context, builder, signature, arguments):
            matrix, old, other, new = arguments[:4]
            eps = splat(builder, arguments[4], LANES)
            others = [load(builder, _at(builder, other, k), F32, LANES) for k in range(N)]
            for i in range(N):
                total = None
                for k in range(N):
                    entry = load(builder, _at(builder, matrix, _place(i, k, rows)), F32, LANES)
                    product = builder.fmul(entry, others[k], flags=FUSED)
                    total = product if total is None else builder.fadd(total, product, flags=FUSED)
                before = load(builder, _at(builder, old, i), F32, LANES)
                divisor = builder.fadd(builder.fmul(before, total, flags=FUSED), eps, flags=FUSED)
                store(builder, _at(builder, new, i), builder.fdiv(before, divisor))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4, types.float32), generate

    return step


def _step_backward(rows):
    """An intrinsic (P, old, other, new, to_new, to_other, to_P, eps): its backward; to_new becomes to_old."""

    @intrinsic
    def step(typingctx, matrix, old, other, new, to_new, to_other, to_matrix, eps):
        def generate(context, builder, signature, arguments):
            matrix, old, other, new, to_new, to_other, to_matrix = arguments[:7]
            eps = splat(builder, arguments[7], LANES)
            others = [load(builder, _at(builder, other, k), F32, LANES) for k in range(N)]
            sums = [load(builder, _at(builder, to_other, k), F32, LANES) for k in range(N)]
            for i in range(N):
                before, after, gradient = (load(builder, _at(builder, x, i), F32, LANES) for x in (old, new, to_new))
                share = builder.fdiv(after, before)
                passed = builder.fmul(builder.fmul(gradient, eps), builder.fmul(share, share))
                to_sum = builder.fneg(builder.fmul(builder.fmul(after, after), gradient))
                store(builder, _at(builder, to_new, i), passed)
                for k in range(N):
                    place = _place(i, k, rows)
                    entry = load(builder, _at(builder, matrix, place), F32, LANES)
                    sums[k] = builder.fadd(sums[k], builder.fmul(entry, to_sum, flags=FUSED), flags=FUSED)
                    total = load(builder, _at(builder, to_matrix, place), F32, LANES)
                    product = builder.fmul(to_sum, others[k], flags=FUSED)
                    store(builder, _at(builder, to_matrix, place), builder.fadd(total, product, flags=FUSED))
            for k in range(N):
                store(builder, _at(builder, to_other, k), sums[k])
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7, types.float32), generate

    return step


_rows, _columns = _step(True), _step(False)
_rows_backward, _columns_backward = _step_backward(True), _step_backward(False)


@compiled()
def _iterate(tile, scalings, steps, eps):
    """scalings[s + 2] is what step s makes of scalings[s], by scalings[s + 1]; the first two, u and v, are 1."""
    scalings[:2] = 1
    matrix, base, size = tile.ctypes.data, scalings.ctypes.data, 4 * N * LANES
    for s in range(steps):
        old = base + s * size
        if s % 2 == 0:
            _rows(matrix, old, old + size, old + 2 * size, eps)
        else:
            _columns(matrix, old, old + size, old + 2 * size, eps)


@compiled()
def _unroll(tile, scalings, steps, eps, gradient, to_tile):
    """dP of dH = `gradient`, after `_iterate`."""
    to_u, to_v = np.zeros((N, LANES), np.float32), np.zeros((N, LANES), np.float32)
    u, v = scalings[steps + 1], scalings[steps]
    for i in range(N):
        for k in range(N):
            for lane in range(LANES):
                to_tile[i, k, lane] = gradient[i, k, lane] * u[i, lane] * v[k, lane]
            for lane in range(LANES):
                to_u[i, lane] += gradient[i, k, lane] * tile[i, k, lane] * v[k, lane]
            for lane in range(LANES):
                to_v[k, lane] += gradient[i, k, lane] * tile[i, k, lane] * u[i, lane]
    matrix, base, size = tile.ctypes.data, scalings.ctypes.data, 4 * N * LANES
    by_u, by_v, by_matrix = to_u.ctypes.data, to_v.ctypes.data, to_tile.ctypes.data
    for s in range(steps - 1, -1, -1):
        old = base + s * size
        if s % 2 == 0:
            _rows_backward(matrix, old, old + size, old + 2 * size, by_u, by_v, by_matrix, eps)
        else:
            _columns_backward(matrix, old, old + size, old + 2 * size, by_v, by_u, by_matrix, eps)
