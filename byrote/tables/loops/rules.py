"""Compiled steps of the row rules (`rules.py`) on rows and state where they are, and the directory of that state.

As in `kernels.py`: addresses and counts; memory is asked for `AHEAD` rows early; no GIL. The callers check all ids.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import math

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from byrote.compiled.vectors import LANES, load, splat, store
from byrote.tables.loops.memory import AHEAD, F32, I32, I64, compiled, fetch, intrinsic, load_f32, load_i64, prefetch


def _adam(lanes):
    """An intrinsic: one step of Adam on `lanes` float32 of a row, its two moments and its gradient."""

    @intrinsic
    def move(typingctx, row, first, second, gradient, beta1, rest1, beta2, rest2, correction1, correction2, eps, rate):
        def generate(context, builder, signature, arguments):
            places, scalars = arguments[:4], [splat(builder, value, lanes) for value in arguments[4:]]
            beta1, rest1, beta2, rest2, correction1, correction2, eps, rate = scalars
            values, m, v, g = (load(builder, place, F32, lanes) for place in places)
            m = builder.fadd(builder.fmul(m, beta1), builder.fmul(g, rest1))
            v = builder.fadd(builder.fmul(v, beta2), builder.fmul(builder.fmul(g, g), rest2))
            kind = ir.FunctionType(values.type, [values.type])
            root = cgutils.get_or_insert_function(builder.module, kind, f"llvm.sqrt.v{lanes}f32")
            below = builder.fadd(builder.call(root, [builder.fdiv(v, correction2)]), eps)
            moved = builder.fdiv(builder.fmul(rate, builder.fdiv(m, correction1)), below)
            for place, new in zip(places, (builder.fsub(values, moved), m, v), strict=False):
                store(builder, place, new)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4, *[types.float32] * 8), generate

    return move


def _step(lanes):
    """An intrinsic (row, gradient, factor): row += factor * gradient, on `lanes` float32."""

    @intrinsic
    def move(typingctx, row, gradient, factor):
        def generate(context, builder, signature, arguments):
            values, g = (load(builder, place, F32, lanes) for place in arguments[:2])
            moved = builder.fmul(splat(builder, arguments[2], lanes), g)
            store(builder, arguments[0], builder.fadd(values, moved))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), generate

    return move


adam_16, adam_1 = _adam(LANES), _adam(1)
step_16, step_1 = _step(LANES), _step(1)


@intrinsic
def _squares(typingctx, source, vectors):
    """The sum of the squares of 16 * `vectors` float32: 16 sums, which are then added by halves."""

    def generate(context, builder, signature, arguments):
        zero = ir.Constant(ir.VectorType(F32, LANES), [0.0] * LANES)
        place = cgutils.alloca_once_value(builder, zero)
        with cgutils.for_range(builder, arguments[1]) as loop:
            address = builder.add(arguments[0], builder.mul(loop.index, I64(4 * LANES)))
            values = load(builder, address, F32, LANES)
            builder.store(builder.fadd(builder.load(place), builder.fmul(values, values)), place)
        sums, lanes = builder.load(place), LANES
        while lanes > 1:
            lanes //= 2
            halves = [ir.Constant(ir.VectorType(I32, lanes), list(range(at, at + lanes))) for at in (0, lanes)]
            sums = builder.fadd(*(builder.shuffle_vector(sums, sums, half) for half in halves))
        return builder.extract_element(sums, I32(0))

    return types.float32(types.int64, types.int64), generate


@intrinsic
def store_f32(typingctx, address, value):
    def generate(context, builder, signature, arguments):
        builder.store(arguments[1], builder.inttoptr(arguments[0], F32.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@compiled
def update_adam(values, ids, first, second, entries, gradient, corrections, count, width, beta1, beta2, eps, rate):
    """Adam on rows ids[i] of `values`, moments entries[i], gradient i; corrections[i] = 1 - beta1^t, 1 - beta2^t."""
    whole, size = width // LANES * LANES, 4 * width
    b1, r1, b2, r2 = np.float32(beta1), np.float32(1 - beta1), np.float32(beta2), np.float32(1 - beta2)
    e, lr = np.float32(eps), np.float32(rate)
    for i in range(count):
        if i + AHEAD < count:
            fetch(values + load_i64(ids + 8 * (i + AHEAD)) * size, size)
            fetch(first + load_i64(entries + 8 * (i + AHEAD)) * size, size)
            fetch(second + load_i64(entries + 8 * (i + AHEAD)) * size, size)
        row, entry = values + load_i64(ids + 8 * i) * size, load_i64(entries + 8 * i) * size
        m, v, g = first + entry, second + entry, gradient + i * size
        c1, c2 = load_f32(corrections + 8 * i), load_f32(corrections + 8 * i + 4)
        for k in range(0, 4 * whole, 4 * LANES):
            adam_16(row + k, m + k, v + k, g + k, b1, r1, b2, r2, c1, c2, e, lr)
        for k in range(4 * whole, size, 4):
            adam_1(row + k, m + k, v + k, g + k, b1, r1, b2, r2, c1, c2, e, lr)


@compiled
def update_adagrad(values, ids, sums, entries, gradient, count, width, eps, rate):
    """Row-wise Adagrad on rows ids[i] of `values`, sums entries[i], gradient i."""
    vectors, size = width // LANES, 4 * width
    whole, e, lr, share = vectors * LANES, np.float32(eps), np.float32(rate), np.float32(width)
    for i in range(count):
        if i + AHEAD < count:
            fetch(values + load_i64(ids + 8 * (i + AHEAD)) * size, size)
            prefetch(sums + load_i64(entries + 8 * (i + AHEAD)) * 4)
        row, g, place = values + load_i64(ids + 8 * i) * size, gradient + i * size, sums + load_i64(entries + 8 * i) * 4
        squares = _squares(g, vectors)
        for k in range(4 * whole, size, 4):
            squares += load_f32(g + k) * load_f32(g + k)
        total = load_f32(place) + squares / share
        store_f32(place, total)
        factor = -lr / (math.sqrt(total) + e)
        for k in range(0, 4 * whole, 4 * LANES):
            step_16(row + k, g + k, factor)
        for k in range(4 * whole, size, 4):
            step_1(row + k, g + k, factor)


@compiled
def claim(directory, rows, touched, entries):
    """entries[i] = directory[rows[i]], where a 0 is first set to the next number after `touched`; the last number."""
    first = directory.ctypes.data
    for i in range(len(rows)):
        if i + AHEAD < len(rows):
            prefetch(first + 4 * rows[i + AHEAD])
        entry = np.int64(directory[rows[i]])
        if entry == 0:
            touched += 1
            entry = touched
            directory[rows[i]] = entry
        entries[i] = entry
    return touched
