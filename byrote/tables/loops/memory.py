"""How compiled loops over random rows ask for memory early, and move it. Needs numba.

    fetch(address, size)                        ask for every cache line of a row, `AHEAD` rows before it is used
    copy(destination, source, size)             what the row holds, in vectors of 32 bytes
    copy_vectors(ends of both, number)          the same of a row that is all vectors, and short
    stream_vectors(ends of both, number)        past the caches, which spares reading the output first

Lines are fetched into the second cache: the first has places for 24 lines on their way, the second for many more
(C on a Zen 4, rows of 160 bytes: 26 ns a row instead of 33). The pieces of a row are straight code, entered where as
many are left as the row has (`ladder`): with loops of three lines and five vectors a row took 36 ns instead of 20.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types

from byrote.compiled import loops
from byrote.compiled.vectors import LANES, ladder, load, store

AHEAD = 48  # rows: what is on its way fits the second cache
LINE = 64  # bytes of a cache line
VECTOR = 32  # bytes: no store crosses a line where rows are multiples of it
STRAIGHT = 512  # bytes of a row that are moved without a loop

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def intrinsic(function):
    # Without types, for mypy: numba itself supplies the first argument of a call.
    return extending.intrinsic(function)


def compiled(function):
    return loops.compiled()(function)


def inlined(function):
    # By numba, as LLVM leaves a call in the loop: a third of the time of a row of 160 bytes.
    return numba.njit(inline="always")(function)


def _loader(kind, result):
    """An intrinsic (source) -> the unaligned number there."""

    @intrinsic
    def load(typingctx, source):
        def generate(context, builder, signature, arguments):
            return builder.load(builder.inttoptr(arguments[0], kind.as_pointer()), align=1)

        return result(types.int64), generate

    return load


load_i64 = _loader(I64, types.int64)
load_f32 = _loader(F32, types.float32)


def unary(produce):
    """An intrinsic (destination, source): produce(builder, source) is stored at the destination."""

    @intrinsic
    def move(typingctx, destination, source):
        def generate(context, builder, signature, arguments):
            store(builder, arguments[0], produce(builder, arguments[1]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return move


copy_32, copy_16, copy_8, copy_4, copy_2, copy_1 = (
    unary(lambda builder, source, size=size: load(builder, source, I8, size)) for size in (32, 16, 8, 4, 2, 1)
)


def _fetch_line(builder, address):
    pointer = I8.as_pointer()
    function = builder.module.declare_intrinsic(
        "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    )
    builder.call(function, [builder.inttoptr(address, pointer), I32(0), I32(2), I32(1)])  # read, second cache, data


def _stream_vector(builder, destination, source):
    values = load(builder, source, I8, VECTOR)
    written = builder.store(values, builder.inttoptr(destination, values.type.as_pointer()), align=VECTOR)
    written.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at an address; any address is allowed."""

    def generate(context, builder, signature, arguments):
        _fetch_line(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _fetch_lines(typingctx, end, count):
    """Ask for the `count` lines before an end; at most one more than `STRAIGHT` bytes have."""

    def generate(context, builder, signature, arguments):
        end, count = arguments
        most = STRAIGHT // LINE + 1
        ladder(builder, count, most, lambda left: _fetch_line(builder, builder.sub(end, I64(LINE * left))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _vectors(move):
    """An intrinsic (ends of destination and source, count): move the `count` vectors before the ends."""

    @intrinsic
    def run(typingctx, destination, source, count):
        def generate(context, builder, signature, arguments):
            *ends, count = arguments

            def step(left):
                move(builder, *(builder.sub(end, I64(VECTOR * left)) for end in ends))

            ladder(builder, count, STRAIGHT // VECTOR, step)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return run


copy_vectors = _vectors(lambda builder, to, source: store(builder, to, load(builder, source, I8, VECTOR)))
stream_vectors = _vectors(_stream_vector)


@inlined
def fetch_straight(address, size):
    """`fetch` of at most `STRAIGHT` bytes."""
    end = (address + size + LINE - 1) & -LINE
    _fetch_lines(end, (end - (address & -LINE)) >> 6)


@inlined
def fetch(address, size):
    line, end = address & -LINE, (address + size + LINE - 1) & -LINE
    while end - line > STRAIGHT + LINE:
        _fetch_lines(line + STRAIGHT, STRAIGHT // LINE)
        line += STRAIGHT
    _fetch_lines(end, (end - line) >> 6)


@inlined
def copy(destination, source, size):
    done = 0
    while size - done > STRAIGHT:
        done += STRAIGHT
        copy_vectors(destination + done, source + done, STRAIGHT // VECTOR)
    if size >= VECTOR:
        whole = size & -VECTOR
        copy_vectors(destination + whole, source + whole, (whole - done) // VECTOR)
        if whole < size:  # some bytes a second time
            copy_32(destination + size - VECTOR, source + size - VECTOR)
    else:
        if size & 16:
            copy_16(destination, source)
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


def _sum(lanes):
    """An intrinsic (destination, source, size, order, count): the sum of `lanes` float32 of `count` rows."""

    @intrinsic
    def run(typingctx, destination, source, size, order, count):
        def generate(context, builder, signature, arguments):
            destination, source, size, order, count = arguments
            zero = ir.Constant(ir.VectorType(F32, lanes), [0.0] * lanes)
            total = cgutils.alloca_once_value(builder, zero)
            builder.store(zero, total)  # at each call: what `once` has stored is of the first
            with cgutils.for_range(builder, count) as loop:
                row = builder.load(
                    builder.inttoptr(builder.add(order, builder.mul(loop.index, I64(8))), I64.as_pointer())
                )
                values = load(builder, builder.add(source, builder.mul(row, size)), F32, lanes)
                builder.store(builder.fadd(builder.load(total), values), total)
            store(builder, destination, builder.load(total))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return run


sum_16, sum_1 = _sum(LANES), _sum(1)


@intrinsic
def fence(typingctx):
    """What was streamed is there for all threads."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate
