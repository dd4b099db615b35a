"""Vectors in the machine code of compiled loops, by address: what numba itself does not offer. Needs numba.

`value` and `address` are LLVM values inside an intrinsic's `generate`; addresses are int64 and need no alignment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

LANES = 16  # values that a vector of 64 bytes holds


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """`lanes` times the same value."""
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes))


def load(builder: Any, address: Any, kind: Any, lanes: int) -> Any:
    pointer = builder.inttoptr(address, ir.VectorType(kind, lanes).as_pointer())
    return builder.load(pointer, align=1)


def store(builder: Any, address: Any, vector: Any) -> None:
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=1)


def ladder(builder: Any, count: Any, most: int, step: Callable[[int], None]) -> None:
    """step(n) for n = count, count - 1 .. 1, and count <= `most`: one jump into straight code instead of a loop."""
    rungs, bottom = [builder.append_basic_block() for _ in range(most)], builder.append_basic_block()
    switch = builder.switch(count, bottom)
    for left, rung, below in zip(range(most, 0, -1), rungs, [*rungs[1:], bottom], strict=True):
        switch.add_case(count.type(left), rung)
        builder.position_at_end(rung)
        step(left)
        builder.branch(below)
    builder.position_at_end(bottom)
