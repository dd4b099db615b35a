"""Read and write of four streams as compiled loops over tokens. `mix.py` imports this file when it first needs it.

A token is a product of a 4 x 4 matrix with [4, d]: the 20 coefficients stay in registers while its columns pass, 16 at
a time. d is a multiple of 16.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from byrote.compiled.loops import compiled
from byrote.compiled.vectors import LANES, load, splat, store

N = 4
F32, I64 = ir.FloatType(), ir.IntType(64)
FUSED = ("contract",)  # a product and a sum may be one operation
RANGE = range(N)


class _Token:
    """The code for one token: arrays by address, all their rows of `size` bytes."""

    def __init__(self, builder, size):
        self.builder, self.size = builder, size

    def coefficients(self, address, count):
        """`count` float32 from an address on, each in all lanes."""
        builder = self.builder
        numbers = [builder.inttoptr(builder.add(address, I64(4 * i)), F32.as_pointer()) for i in range(count)]
        return [splat(builder, builder.load(number, align=4), LANES) for number in numbers]

    def columns(self):
        """Loop over the columns, 16 at a time: gives their offset in bytes."""
        return cgutils.for_range_slice(self.builder, I64(0), self.size, I64(4 * LANES), intp=I64)

    def _place(self, address, row, offset):
        builder = self.builder
        return builder.add(builder.add(address, builder.mul(self.size, I64(row))), offset)

    def load(self, address, row, offset):
        return load(self.builder, self._place(address, row, offset), F32, LANES)

    def store(self, address, row, offset, vector):
        store(self.builder, self._place(address, row, offset), vector)

    def sum(self, products):
        """Of pairs of vectors, and of single ones."""
        total = None
        for pair in products:
            one = self.builder.fmul(*pair, flags=FUSED) if isinstance(pair, tuple) else pair
            total = one if total is None else self.builder.fadd(total, one, flags=FUSED)
        return total

    def totals(self, count):
        zero = ir.Constant(ir.VectorType(F32, LANES), [0.0] * LANES)
        return [cgutils.alloca_once_value(self.builder, zero) for _ in range(count)]

    def add(self, total, left, right):
        builder = self.builder
        builder.store(self.sum([builder.load(total), (left, right)]), total)

    def write_totals(self, totals, address):
        """The sum over the lanes of each, as float32 from an address on."""
        builder = self.builder
        kind = ir.FunctionType(F32, [F32, ir.VectorType(F32, LANES)])
        reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
        for i, total in enumerate(totals):
            number = builder.call(reduce, [F32(0.0), builder.load(total)], fastmath=("reassoc",))
            builder.store(number, builder.inttoptr(builder.add(address, I64(4 * i)), F32.as_pointer()), align=4)


def _per_token(produce):
    """An intrinsic (addresses of a token in each array, bytes of d values)."""

    @intrinsic
    def token(typingctx, addresses, size):
        def generate(context, builder, signature, arguments):
            produce(_Token(builder, arguments[1]), *cgutils.unpack_tuple(builder, arguments[0]))
            return context.get_dummy_value()

        return types.void(addresses, types.int64), generate

    return token


@_per_token
def _read(token, streams, pre, x):
    pre = token.coefficients(pre, N)
    with token.columns() as (at, _):
        token.store(x, 0, at, token.sum([(pre[k], token.load(streams, k, at)) for k in RANGE]))


@_per_token
def _write(token, streams, y, mix, post, out):
    mix, post = token.coefficients(mix, N * N), token.coefficients(post, N)
    with token.columns() as (at, _):
        columns, added = [token.load(streams, k, at) for k in RANGE], token.load(y, 0, at)
        for i in RANGE:
            products = [(post[i], added), *((mix[N * i + k], columns[k]) for k in RANGE)]
            token.store(out, i, at, token.sum(products))


@_per_token
def _write_back_backward(token, streams, y, post, gradient, to_y, to_mix, to_post):
    # The sums of a row of H at a time: with all of them in one loop they would not stay in registers.
    post, by_post = token.coefficients(post, N), token.totals(N)
    by_mix = token.totals(N * N)
    with token.columns() as (at, _):
        columns, added = [token.load(gradient, i, at) for i in RANGE], token.load(y, 0, at)
        token.store(to_y, 0, at, token.sum([(post[i], columns[i]) for i in RANGE]))
        for i in RANGE:
            token.add(by_post[i], columns[i], added)
        for k in RANGE:
            state = token.load(streams, k, at)
            for i in RANGE:
                token.add(by_mix[N * i + k], columns[i], state)
    token.write_totals(by_mix, to_mix)
    token.write_totals(by_post, to_post)


@_per_token
def _connect_backward(token, streams, pre, mix, shrink, to_x, gradient, to_streams):
    pre, mix, [shrink] = token.coefficients(pre, N), token.coefficients(mix, N * N), token.coefficients(shrink, 1)
    with token.columns() as (at, _):
        columns, read = [token.load(gradient, i, at) for i in RANGE], token.load(to_x, 0, at)
        for k in RANGE:
            parts = [(pre[k], read), (shrink, token.load(streams, k, at))]
            token.store(to_streams, k, at, token.sum(parts + [(mix[N * i + k], columns[i]) for i in RANGE]))


@_per_token
def _dots(token, streams, to_x, to_pre):
    sums = token.totals(N)
    with token.columns() as (at, _):
        gradient = token.load(to_x, 0, at)
        for k in RANGE:
            token.add(sums[k], gradient, token.load(streams, k, at))
    token.write_totals(sums, to_pre)


@_per_token
def _square(token, streams, out):
    sums = token.totals(N)
    with token.columns() as (at, _):
        for k in RANGE:
            column = token.load(streams, k, at)
            token.add(sums[k], column, column)
    token.write_totals(sums, out)


def _compiled(*arrays):
    three, two = "float32[:,:,::1]", "float32[:,::1]"
    kinds = ", ".join(three if name == "three" else two for name in arrays)
    return compiled(f"void(int64, int64, {kinds})")


@_compiled("three", "two", "three", "two", "three")
def write(begin, end, streams, y, mix, post, out):
    for t in range(begin, end):
        inputs = streams[t].ctypes.data, y[t].ctypes.data, mix[t].ctypes.data, post[t].ctypes.data
        _write((*inputs, out[t].ctypes.data), 4 * y.shape[1])


@_compiled("three", "two", "two", "three", "two", "three", "two")
def write_back_backward(begin, end, streams, y, post, gradient, to_y, to_mix, to_post):
    for t in range(begin, end):
        inputs = streams[t].ctypes.data, y[t].ctypes.data, post[t].ctypes.data, gradient[t].ctypes.data
        outputs = to_y[t].ctypes.data, to_mix[t].ctypes.data, to_post[t].ctypes.data
        _write_back_backward((*inputs, *outputs), 4 * y.shape[1])
