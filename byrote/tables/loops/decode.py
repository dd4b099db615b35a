"""Stored numbers to float32 in compiled loops: what `codecs.py` says of each codec, on vectors. Needs numba.

bf16_16(destination, source)          16 values; bf16_1 and so on for what is left at the end of a row
fp8_16, int8_16, int4_16(destination, source, scale)
e8m0(source)                          a block's scale
"""

# No `from __future__ import annotations` here: numba reads the signatures.
from llvmlite import ir
from numba.core import types

from byrote.compiled.vectors import LANES, load, splat, store
from byrote.tables.loops.memory import F32, I8, I16, I32, intrinsic, unary


def _constant(kind, number, lanes):
    return ir.Constant(ir.VectorType(kind, lanes), [number] * lanes)


def _scaled(produce):
    """An intrinsic (destination, source, scale): produce(builder, source) * scale is stored at the destination."""

    @intrinsic
    def move(typingctx, destination, source, scale):
        def generate(context, builder, signature, arguments):
            values = produce(builder, arguments[1])
            scales = splat(builder, arguments[2], values.type.count)
            store(builder, arguments[0], builder.fmul(values, scales))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), generate

    return move


def _bf16(lanes):
    def produce(builder, source):
        wide = builder.zext(load(builder, source, I16, lanes), ir.VectorType(I32, lanes))
        return builder.shl(wide, _constant(I32, 16, lanes))  # a bf16 is the upper half of a float32

    return unary(produce)


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


@intrinsic
def e8m0(typingctx, source):
    """The power of two 2^(byte - 127) at an address; byte 255 is NaN, byte 0 the subnormal 2^-127."""

    def generate(context, builder, signature, arguments):
        byte = builder.zext(builder.load(builder.inttoptr(arguments[0], I8.as_pointer())), I32)
        bits = builder.shl(byte, I32(23))
        bits = builder.select(builder.icmp_unsigned("==", byte, I32(0)), I32(0x400000), bits)
        bits = builder.select(builder.icmp_unsigned("==", byte, I32(255)), I32(0x7FC00000), bits)
        return builder.bitcast(bits, F32)

    return types.float32(types.int64), generate


bf16_16, bf16_1 = _bf16(LANES), _bf16(1)
fp8_16, fp8_1 = _fp8(LANES), _fp8(1)
int8_16, int8_1 = _int8(LANES), _int8(1)
int4_16, int4_2, int4_1 = _int4(LANES), _int4(2), _int4(1)
