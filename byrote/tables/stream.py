"""A safetensors file written piece by piece: what it holds need not fit into memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from byrote.tables.checksums import discard
from byrote.tables.disk import naming

NAMES = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
Pieces = tuple[torch.dtype, tuple[int, ...], Callable[[], Iterator[Tensor]]]


def stream(path: Path, arrays: Mapping[str, Pieces], header: dict[str, Any]) -> None:
    """A file of name -> (dtype, shape, pieces of it in order); it has its name when it is whole."""
    content: dict[str, Any] = {"__metadata__": {"byrote": json.dumps(header)}}
    at = 0
    for name, (dtype, shape, _) in arrays.items():
        end = at + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with naming(path), open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, pieces in arrays.values():
            for piece in pieces():
                file.write(as_bytes(piece, piece[:1].nbytes).data)
    discard(path)
    os.replace(temporary, path)


def as_bytes(values: Tensor, size: int) -> np.ndarray:
    """The numbers of each entry as `size` bytes, [U, size]."""
    if not len(values):
        return np.empty((0, size), np.uint8)  # which torch does not view
    return values.contiguous().flatten().view(torch.uint8).numpy().reshape(len(values), size)
