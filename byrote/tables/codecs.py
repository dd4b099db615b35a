"""How a row is stored: W float32 values <-> a record of B bytes, values and scales side by side.

    codec            record of W values                                   B                  worst error of a row
    fp32             W float32                                            4 W                0
    bf16             W bfloat16, to nearest                               2 W                2^-8 largest
    bf16-stochastic  W bfloat16, up or down by chance, right on average   2 W                2^-7 largest
    fp8              W e4m3fn, then a power of two for each 32 (e8m0)     W + ceil(W / 32)   2^-4 largest
    int8             W int8, then the row's scale (float32)               W + 4              largest / 253
    int4             two values a byte, then the row's scale (float32)    ceil(W / 2) + 4    largest / 13.9

`largest` is the largest magnitude in the row (in the block of 32 for fp8). Numbers are little-endian; scales lie at
the end of the record, unaligned.

fp8 is the row of DeepSeek-V4.1 (256 values: 264 bytes) and its rule: the scale is the least 2^e with
largest <= 448 2^e, so nothing overflows; e is at least -127. A byte 0x7F or 0xFF, or a scale byte 255, reads as NaN.
int8 uses -127 .. 127 and int4 -7 .. 7: value = integer * scale, where scale = largest / 127 or / 7, cut to 16
significant bits so that the product is exact. int4 holds value 2i in the low and 2i + 1 in the high half of byte i, in
two's complement; the spare half of an odd width is 0. Zero stays zero, and what was decoded is encoded without loss.

Small steps of training vanish in fp8, int8 and int4: a value moves only if the step is more than half of the distance
to its neighbour. Train in fp32, or in bf16-stochastic, where a small step is kept on average: it adds 16 random bits
below the bfloat16 and cuts.

The functions here are plain torch; `gather.py` reads records with compiled loops that give the same bits.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32  # values that share a scale in fp8
BF16_MAX = torch.finfo(torch.bfloat16).max
FP8_MAX = 240 * 2.0**120  # the last e4m3 multiple of a power of two that float32 holds: the next is 2^128
LEAST_SCALE = 2.0**-126  # of int8 and int4: the least float32 with all its bits


class Codec(Protocol):
    """Rows [U, W] float32 <-> records [U, B] uint8."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype:
        """What a record is an array of: the values' dtype where they are stored as such, else uint8."""
        ...

    def record_bytes(self, width: int) -> int: ...

    def encode(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Records of rows; ValueError where a value is not finite. A value beyond the range becomes the last in it."""
        ...

    def decode(self, records: Tensor, width: int) -> Tensor: ...

    def bound(self, values: Tensor) -> Tensor:
        """The worst error [U] that a value of each row may suffer."""
        ...


@dataclass(frozen=True)
class Float32:
    """float32 as it is: 4 W bytes."""

    name: str = "fp32"
    dtype: torch.dtype = torch.float32

    def record_bytes(self, width: int) -> int:
        return 4 * width

    def encode(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        check_finite(values)
        return values.contiguous().view(torch.uint8)

    def decode(self, records: Tensor, width: int) -> Tensor:
        return _copy(records).view(torch.float32)

    def bound(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(values))


@dataclass(frozen=True)
class BFloat16:
    """bfloat16, rounded to the nearest or, `stochastic`, by chance: 2 W bytes. Beyond its range it saturates."""

    name: str = "bf16"
    dtype: torch.dtype = torch.bfloat16
    stochastic: bool = False

    def record_bytes(self, width: int) -> int:
        return 2 * width

    def encode(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if check_finite(values) > BF16_MAX:
            values = values.clamp(-BF16_MAX, BF16_MAX)
        if not self.stochastic:
            return values.to(torch.bfloat16).view(torch.uint8)
        if generator is None:
            raise ValueError(f"codec {self.name} rounds by chance: give encode a torch.Generator")
        noise = torch.empty(values.shape, dtype=torch.int32).random_(0, 1 << 16, generator=generator)
        noise = noise.to(values.device)  # drawn on the host, so that every device rounds alike
        return ((values.contiguous().view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.uint8)

    def decode(self, records: Tensor, width: int) -> Tensor:
        return _copy(records).view(torch.bfloat16).float()

    def bound(self, values: Tensor) -> Tensor:
        step = 2.0**-7 * _largest(values) + 2.0**-133
        return step if self.stochastic else step / 2


@dataclass(frozen=True)
class Float8:
    """float8 e4m3 with one power-of-two scale for each 32 values: W + ceil(W / 32) bytes. It saturates."""

    name: str = "fp8"
    dtype: torch.dtype = torch.uint8

    def record_bytes(self, width: int) -> int:
        return width + -(-width // BLOCK)

    def encode(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if check_finite(values) > FP8_MAX:
            values = values.clamp(-FP8_MAX, FP8_MAX)
        width = values.shape[1]
        blocks = F.pad(values, (0, -width % BLOCK)).unflatten(1, (-(-width // BLOCK), BLOCK))
        mantissa, exponent = torch.frexp(blocks.abs().amax(2))
        # largest = mantissa 2^exponent, 1/2 <= mantissa < 1, and 448 = 0.875 * 2^9.
        exponent = (exponent - 8 - (mantissa <= 0.875).int()).clamp_min(-127)
        inverse = ((127 - exponent) << 23).view(torch.float32)
        numbers = (blocks * inverse[..., None]).flatten(1)[:, :width].to(torch.float8_e4m3fn)
        return torch.cat([numbers.view(torch.uint8), (exponent + 127).to(torch.uint8)], 1)

    def decode(self, records: Tensor, width: int) -> Tensor:
        numbers = _copy(records[:, :width]).view(torch.float8_e4m3fn).float()
        scales = _copy(records[:, width:]).view(torch.float8_e8m0fnu).float()
        return numbers * scales.repeat_interleave(BLOCK, 1)[:, :width]

    def bound(self, values: Tensor) -> Tensor:
        return 2.0**-4 * _largest(values) + 2.0**-137


@dataclass(frozen=True)
class Integer:
    """Integers -limit .. limit and one scale a row; two integers a byte if `packed`."""

    name: str
    limit: int
    packed: bool
    dtype: torch.dtype = torch.uint8

    def record_bytes(self, width: int) -> int:
        return (-(-width // 2) if self.packed else width) + 4

    def encode(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        check_finite(values)
        scale = (_largest(values) / self.limit).clamp_min(LEAST_SCALE)
        scale = (scale.view(torch.int32) & -256).view(torch.float32)[:, None]
        integers = (values / scale).round_().clamp_(-self.limit, self.limit).to(torch.int8).view(torch.uint8)
        if self.packed:
            integers = F.pad(integers, (0, values.shape[1] % 2)) & 15
            integers = integers[:, ::2] | integers[:, 1::2] << 4
        return torch.cat([integers, scale.view(torch.uint8)], 1)

    def decode(self, records: Tensor, width: int) -> Tensor:
        integers, scale = records[:, :-4].view(torch.int8), _copy(records[:, -4:]).view(torch.float32)
        if self.packed:
            integers = torch.stack([integers << 4 >> 4, integers >> 4], 2).flatten(1)[:, :width]
        return integers.float() * scale

    def bound(self, values: Tensor) -> Tensor:
        return 0.5001 * (_largest(values) / self.limit).clamp_min(LEAST_SCALE)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Float32(),
        BFloat16(),
        BFloat16("bf16-stochastic", stochastic=True),
        Float8(),
        Integer("int8", 127, packed=False),
        Integer("int4", 7, packed=True),
    )
}


def check_finite(values: Tensor) -> float:
    """The largest magnitude; ValueError, with the place of the first bad row, where a value is not finite."""
    if not values.numel():
        return 0.0
    low, high = (float(end) for end in torch.aminmax(values))
    if not -float("inf") < low <= high < float("inf"):
        row = int((~values.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(
            f"row {row} of the {len(values)} given holds a value that is not finite; nothing was written. "
            "Look for an overflow where the rows come from, such as a learning rate that is too high"
        )
    return max(-low, high)


def _largest(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, float("inf"), dim=1)


def _copy(part: Tensor) -> Tensor:
    """Bytes in a place of their own, so that they can be viewed as wider numbers."""
    return part.clone(memory_format=torch.contiguous_format)


def chance(digest: str, generation: int) -> torch.Generator:
    """Of stochastic rounding: it follows from the table and its generation, so that a resumed run repeats it."""
    # One number of 32 bits: a CPU generator takes no more of its seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{digest} {generation}".encode()))
