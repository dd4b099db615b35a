"""Tables as others have released them: tensors of a checkpoint, read as they are.

    values [R, W] of F32, BF16, F16, F8_E4M3 or I8
    scales [R, S], each for W / S neighbouring values of its row; or none
           F8_E8M0, or U8 in its place: the power of two 2^(byte - 127); or F32, BF16, F16

    row = values * scales, in float32

DeepSeek-V4.1-Flash: `layers.L.engram.embed.weight` F8_E4M3 [R, 256], `layers.L.engram.embed.scale` F8_E8M0 [R, 8].
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from byrote.tables.files.headers import read_header, weight_map

NUMBERS = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}
SCALES = {
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.float8_e8m0fnu,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
WEIGHT, SCALE = re.compile(r"(.*\.engram\.embed)\.weight$"), ".scale"


@dataclass(frozen=True)
class Form:
    """How rows of `width` values are stored; `scale_dtype` None and `scales` 0: without scales."""

    dtype: str
    width: int
    scale_dtype: str | None = None
    scales: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in NUMBERS:
            raise ValueError(f"values of {self.dtype} are no rows of a released table, which are {', '.join(NUMBERS)}")
        if self.scale_dtype is None:
            return
        if self.scale_dtype not in SCALES:
            raise ValueError(f"scales of {self.scale_dtype} are unknown; they may be {', '.join(SCALES)}")
        if not self.scales or self.width % self.scales:
            raise ValueError(
                f"{self.scales} scales a row do not divide {self.width} values: give the scales of this table"
            )

    def __str__(self) -> str:
        if self.scale_dtype is None:
            return self.dtype
        return f"{self.dtype} with a scale {self.scale_dtype} for each {self.width // self.scales} values"

    @property
    def codec(self) -> str | None:
        """The codec of ours that stores the same bytes, if there is one, values and scales side by side."""
        if self.scale_dtype is None:
            return {"F32": "fp32", "BF16": "bf16"}.get(self.dtype)
        powers = self.scale_dtype in ("F8_E8M0", "U8") and 32 * self.scales == self.width
        return "fp8" if self.dtype == "F8_E4M3" and powers else None

    def decode(self, values: Tensor, scales: Tensor | None) -> Tensor:
        """Rows [U, W] float32 from records of bytes [U, ...] of values and of scales."""
        numbers = values.view(NUMBERS[self.dtype]).float()
        if scales is None:
            return numbers
        assert self.scale_dtype is not None
        factors = scales.view(SCALES[self.scale_dtype]).float()
        return numbers * factors.repeat_interleave(self.width // self.scales, 1)


def released_tables(path: Path) -> dict[str, str | None]:
    """Names of the tensors with values -> of those with scales, of the tables in a file or checkpoint folder."""
    names = weight_map(path) if path.is_dir() else read_header(path)[0]
    found = {}
    for name in sorted(names):
        if match := WEIGHT.match(name):
            scale = match[1] + SCALE
            found[name] = scale if scale in names else None
    return found
