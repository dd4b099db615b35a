"""Compiled loops over records in memory, by address. `gather.py` imports this file when it first needs one.

Every argument is an integer: an address or a count. So each loop compiles once, for any array (read-only mappings
too), is cached beside this file, and runs without the GIL. The callers keep the arrays alive and check all ids.

What makes a loop over random rows fast is that the memory is asked for early: while one row is copied, each cache
line of the row `AHEAD` places later is fetched (`llvm.prefetch`), and rows move in vectors of 64 bytes. An output that
no cache holds is written past the caches, which saves reading it first.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from byrote.vectors import LANES, load, splat, store

AHEAD = 24  # rows: about what the memory system keeps in flight
LINE = 64  # bytes of a cache line
BEYOND_CACHES = 32 << 20  # bytes

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _compiled(function):
    return numba.njit(cache=True, nogil=True)(function)


def _inlined(function):
    # By numba, as LLVM leaves a call in the loop: a third of the time of a row of 160 bytes.
    return numba.njit(inline="always")(function)


def _intrinsic(function):
    return intrinsic(function)


def _constant(kind, number, lanes):
    return ir.Constant(ir.VectorType(kind, lanes), [number] * lanes)


@_intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address; any address is allowed."""

    def generate(context, builder, signature, arguments):
        pointer = I8.as_pointer()
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        )
        builder.call(function, [builder.inttoptr(arguments[0], pointer), I32(0), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _unary(produce):
    """An intrinsic (destination, source): produce(builder, source) is stored at the destination."""

    @_intrinsic
    def move(typingctx, destination, source):
        def generate(context, builder, signature, arguments):
            store(builder, arguments[0], produce(builder, arguments[1]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return move


def _scaled(produce):
    """An intrinsic (destination, source, scale): produce(builder, source) * scale is stored at the destination."""

    @_intrinsic
    def move(typingctx, destination, source, scale):
        def generate(context, builder, signature, arguments):
            values = produce(builder, arguments[1])
            scales = splat(builder, arguments[2], values.type.count)
            store(builder, arguments[0], builder.fmul(values, scales))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), generate

    return move


def _loader(kind, result):
    """An intrinsic (source) -> the unaligned number there."""

    @_intrinsic
    def load(typingctx, source):
        def generate(context, builder, signature, arguments):
            return builder.load(builder.inttoptr(arguments[0], kind.as_pointer()), align=1)

        return result(types.int64), generate

    return load


load_i64 = _loader(I64, types.int64)
load_f32 = _loader(F32, types.float32)
copy_64, copy_32, copy_16, copy_8, copy_4, copy_2, copy_1 = (
    _unary(lambda builder, source, size=size: load(builder, source, I8, size)) for size in (64, 32, 16, 8, 4, 2, 1)
)


def _bf16(lanes):
    def produce(builder, source):
        wide = builder.zext(load(builder, source, I16, lanes), ir.VectorType(I32, lanes))
        return builder.shl(wide, _constant(I32, 16, lanes))  # a bf16 is the upper half of a float32

    return _unary(produce)


def _fp8(lanes):
    def produce(builder, source):
        bits = builder.zext(load(builder, source, I8, lanes), ir.VectorType(I32, lanes))
        low = builder.and_(bits, _constant(I32, 0x7F, lanes))
        sign = builder.shl(builder.and_(bits, _constant(I32, 0x80, lanes)), _constant(I32, 24, lanes))
        # Exponent and mantissa in the places of a float32, whose exponent counts from 127 and not from 7.
        body = builder.bitcast(
            builder.or_(builder.shl(low, _constant(I32, 20, lanes)), sign), ir.VectorType(F32, lanes)
        )
        values = builder.fmul(body, _constant(F32, 2.0**120, lanes))
        nan = builder.icmp_unsigned("==", low, _constant(I32, 0x7F, lanes))
        return builder.select(nan, _constant(F32, float("nan"), lanes), values)

    return _scaled(produce)


def _int8(lanes):
    def produce(builder, source):
        wide = builder.sext(load(builder, source, I8, lanes), ir.VectorType(I32, lanes))
        return builder.sitofp(wide, ir.VectorType(F32, lanes))

    return _scaled(produce)


def _int4(lanes):
    def produce(builder, source):
        half = max(lanes // 2, 1)
        pairs = builder.zext(load(builder, source, I8, half), ir.VectorType(I32, half))
        # Shift a nibble to the top, then down again with its sign.
        low = builder.ashr(builder.shl(pairs, _constant(I32, 28, half)), _constant(I32, 28, half))
        high = builder.ashr(builder.shl(pairs, _constant(I32, 24, half)), _constant(I32, 28, half))
        order = [place for i in range(half) for place in (i, half + i)][:lanes]
        both = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, lanes), order))
        return builder.sitofp(both, ir.VectorType(F32, lanes))

    return _scaled(produce)


@_intrinsic
def _e8m0(typingctx, source):
    """The power of two 2^(byte - 127) at an address; byte 255 is NaN, byte 0 the subnormal 2^-127."""

    def generate(context, builder, signature, arguments):
        byte = builder.zext(builder.load(builder.inttoptr(arguments[0], I8.as_pointer())), I32)
        bits = builder.shl(byte, I32(23))
        bits = builder.select(builder.icmp_unsigned("==", byte, I32(0)), I32(0x400000), bits)
        bits = builder.select(builder.icmp_unsigned("==", byte, I32(255)), I32(0x7FC00000), bits)
        return builder.bitcast(bits, F32)

    return types.float32(types.int64), generate


@_intrinsic
def stream_32(typingctx, destination, source):
    """Copy 32 bytes past the caches; the destination is at a multiple of 32."""

    def generate(context, builder, signature, arguments):
        values = load(builder, arguments[1], I8, 32)
        written = builder.store(values, builder.inttoptr(arguments[0], values.type.as_pointer()), align=32)
        written.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@_intrinsic
def fence(typingctx):
    """What was streamed is there for all threads."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


bf16_16, bf16_1 = _bf16(LANES), _bf16(1)
fp8_16, fp8_1 = _fp8(LANES), _fp8(1)
int8_16, int8_1 = _int8(LANES), _int8(1)
int4_16, int4_2, int4_1 = _int4(LANES), _int4(2), _int4(1)


@_inlined
def _fetch(address, size):
    line = address & -LINE
    while line < address + size:
        prefetch(line)
        line += LINE


@_inlined
def _copy(destination, source, size):
    done = 0
    while done + 64 <= size:
        copy_64(destination + done, source + done)
        done += 64
    if size & 32:
        copy_32(destination + done, source + done)
        done += 32
    if size & 16:
        copy_16(destination + done, source + done)
        done += 16
    if size & 8:
        copy_8(destination + done, source + done)
        done += 8
    if size & 4:
        copy_4(destination + done, source + done)
        done += 4
    if size & 2:
        copy_2(destination + done, source + done)
        done += 2
    if size & 1:
        copy_1(destination + done, source + done)


@_inlined
def _stream(destination, source, size):
    done = 0
    while done + 64 <= size:
        stream_32(destination + done, source + done)
        stream_32(destination + done + 32, source + done + 32)
        done += 64
    if size & 32:
        stream_32(destination + done, source + done)


@_compiled
def gather(records, size, ids, count, out):
    """out[i] = records[ids[i]], `size` bytes each."""
    if count * size >= BEYOND_CACHES and size % 32 == 0 and out % 32 == 0:
        for i in range(count):
            if i + AHEAD < count:
                _fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
            _stream(out + i * size, records + load_i64(ids + 8 * i) * size, size)
        fence()
        return
    for i in range(count):
        if i + AHEAD < count:
            _fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
        _copy(out + i * size, records + load_i64(ids + 8 * i) * size, size)


@_compiled
def scatter(records, size, ids, count, values):
    """records[ids[i]] = values[i], `size` bytes each."""
    for i in range(count):
        if i + AHEAD < count:
            _fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
        _copy(records + load_i64(ids + 8 * i) * size, values + i * size, size)


@_compiled
def copy(addresses, size, count, out):
    """out[i] = the `size` bytes at address addresses[i]."""
    for i in range(count):
        if i + AHEAD < count:
            _fetch(load_i64(addresses + 8 * (i + AHEAD)), size)
        _copy(out + i * size, load_i64(addresses + 8 * i), size)


@_compiled
def gather_bf16(records, size, ids, count, out, width):
    for i in range(count):
        if i + AHEAD < count:
            _fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
        source, destination = records + load_i64(ids + 8 * i) * size, out + 4 * width * i
        whole = width // LANES * LANES
        for k in range(0, whole, LANES):
            bf16_16(destination + 4 * k, source + 2 * k)
        for k in range(whole, width):
            bf16_1(destination + 4 * k, source + 2 * k)


@_compiled
def gather_fp8(records, size, ids, count, out, width):
    for i in range(count):
        if i + AHEAD < count:
            _fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
        source, destination = records + load_i64(ids + 8 * i) * size, out + 4 * width * i
        whole = width // LANES * LANES
        for k in range(0, whole, LANES):
            fp8_16(destination + 4 * k, source + k, _e8m0(source + width + k // 32))
        for k in range(whole, width):
            fp8_1(destination + 4 * k, source + k, _e8m0(source + width + k // 32))


@_compiled
def gather_int8(records, size, ids, count, out, width):
    for i in range(count):
        if i + AHEAD < count:
            _fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
        source, destination = records + load_i64(ids + 8 * i) * size, out + 4 * width * i
        scale = load_f32(source + width)
        whole = width // LANES * LANES
        for k in range(0, whole, LANES):
            int8_16(destination + 4 * k, source + k, scale)
        for k in range(whole, width):
            int8_1(destination + 4 * k, source + k, scale)


@_compiled
def gather_int4(records, size, ids, count, out, width):
    for i in range(count):
        if i + AHEAD < count:
            _fetch(records + load_i64(ids + 8 * (i + AHEAD)) * size, size)
        source, destination = records + load_i64(ids + 8 * i) * size, out + 4 * width * i
        scale = load_f32(source + size - 4)
        whole, pairs = width // LANES * LANES, width // 2 * 2
        for k in range(0, whole, LANES):
            int4_16(destination + 4 * k, source + k // 2, scale)
        for k in range(whole, pairs, 2):
            int4_2(destination + 4 * k, source + k // 2, scale)
        if pairs < width:
            int4_1(destination + 4 * pairs, source + pairs // 2, scale)


@_compiled
def nonzero_rows(values, count, width, out):
    """out[i] = 1 if row i of float32 has a value that is not 0, else 0."""
    for i in range(count):
        row, k = values + 4 * width * i, 0
        while k < width and load_f32(row + 4 * k) == 0:
            k += 1
        out[i] = k < width
