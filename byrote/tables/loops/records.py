"""Compiled loops over records in memory, by address. `gather.py` imports this file when it first needs one.

Every argument is an integer: an address or a count. So each loop compiles once, for any array (read-only mappings
too), is cached beside this file, and runs without the GIL. The callers keep the arrays alive and check all ids.

What makes a loop over random rows fast is that the memory is asked for early (`moves.py`).
"""

# No `from __future__ import annotations` here: numba reads the signatures.
from byrote.compiled.vectors import LANES
from byrote.tables.loops.decode import bf16_1, bf16_16, e8m0, fp8_1, fp8_16, int4_1, int4_2, int4_16, int8_1, int8_16
from byrote.tables.loops.memory import (
    AHEAD,
    STRAIGHT,
    VECTOR,
    compiled,
    copy_vectors,
    fence,
    fetch,
    fetch_straight,
    load_f32,
    load_i64,
    stream_vectors,
    sum_1,
    sum_16,
)
from byrote.tables.loops.memory import copy as move

BEYOND_CACHES = 16 << 20  # bytes: from there on what reads the rows next is faster, too


@compiled
def gather(records, size, ids, count, out):
    """out[i] = records[ids[i]], `size` bytes each."""
    if size % VECTOR == 0 and size <= STRAIGHT:  # most rows; nothing is asked of the size inside the loops
        vectors = size // VECTOR
        if count * size < BEYOND_CACHES or out % VECTOR:
            for i in range(count):
                if i + AHEAD < count:
                    fetch_straight(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
                copy_vectors(out + (i + 1) * size, records + (load_i64(ids + 8 * i) + 1) * size, vectors)
            return
        for i in range(count):
            if i + AHEAD < count:
                fetch_straight(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
            stream_vectors(out + (i + 1) * size, records + (load_i64(ids + 8 * i) + 1) * size, vectors)
        fence()
        return
    for i in range(count):
        if i + AHEAD < count:
            fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
        move(out + i * size, records + load_i64(ids + 8 * i) * size, size)


@compiled
def scatter(records, size, ids, count, values):
    """records[ids[i]] = values[i], `size` bytes each."""
    for i in range(count):
        if i + AHEAD < count:
            fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
        move(records + load_i64(ids + 8 * i) * size, values + i * size, size)


@compiled
def copy(addresses, size, count, out):
    """out[i] = the `size` bytes at address addresses[i]."""
    for i in range(count):
        if i + AHEAD < count:
            fetch(load_i64(addresses + 8 * (i + AHEAD)), size)
        move(out + i * size, load_i64(addresses + 8 * i), size)


@compiled
def gather_bf16(records, size, ids, count, out, width):
    for i in range(count):
        if i + AHEAD < count:
            fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
        source, destination = records + load_i64(ids + 8 * i) * size, out + 4 * width * i
        whole = width // LANES * LANES
        for k in range(0, whole, LANES):
            bf16_16(destination + 4 * k, source + 2 * k)
        for k in range(whole, width):
            bf16_1(destination + 4 * k, source + 2 * k)


@compiled
def gather_fp8(records, size, ids, count, out, width):
    for i in range(count):
        if i + AHEAD < count:
            fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
        source, destination = records + load_i64(ids + 8 * i) * size, out + 4 * width * i
        whole = width // LANES * LANES
        for k in range(0, whole, LANES):
            fp8_16(destination + 4 * k, source + k, e8m0(source + width + k // 32))
        for k in range(whole, width):
            fp8_1(destination + 4 * k, source + k, e8m0(source + width + k // 32))


@compiled
def gather_int8(records, size, ids, count, out, width):
    for i in range(count):
        if i + AHEAD < count:
            fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
        source, destination = records + load_i64(ids + 8 * i) * size, out + 4 * width * i
        scale = load_f32(source + width)
        whole = width // LANES * LANES
        for k in range(0, whole, LANES):
            int8_16(destination + 4 * k, source + k, scale)
        for k in range(whole, width):
            int8_1(destination + 4 * k, source + k, scale)


@compiled
def gather_int4(records, size, ids, count, out, width):
    for i in range(count):
        if i + AHEAD < count:
            fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
        source, destination = records + load_i64(ids + 8 * i) * size, out + 4 * width * i
        scale = load_f32(source + size - 4)
        whole, pairs = width // LANES * LANES, width // 2 * 2
        for k in range(0, whole, LANES):
            int4_16(destination + 4 * k, source + k // 2, scale)
        for k in range(whole, pairs, 2):
            int4_2(destination + 4 * k, source + k // 2, scale)
        if pairs < width:
            int4_1(destination + 4 * pairs, source + pairs // 2, scale)


DECODE = {"fp32": gather, "bf16": gather_bf16, "bf16-stochastic": gather_bf16}
DECODE |= {"fp8": gather_fp8, "int8": gather_int8, "int4": gather_int4}


@compiled
def sum_runs(values, order, ends, count, width, out, nonzero):
    """out[i] = sum of values[order[j]] for ends[i - 1] <= j < ends[i], in that order, from 0; whether it is not 0."""
    whole, size, last, begin = width // LANES * LANES, 4 * width, load_i64(ends + 8 * (count - 1)), 0
    for i in range(count):
        end = load_i64(ends + 8 * i)
        for j in range(begin + AHEAD, min(end + AHEAD, last)):
            fetch(values + load_i64(order + 8 * j) * size, size)
        row = out + i * size
        for k in range(0, 4 * whole, 4 * LANES):
            sum_16(row + k, values + k, size, order + 8 * begin, end - begin)
        for k in range(4 * whole, size, 4):
            sum_1(row + k, values + k, size, order + 8 * begin, end - begin)
        k = 0
        while k < size and load_f32(row + k) == 0:
            k += 4
        nonzero[i] = k < size
        begin = end
