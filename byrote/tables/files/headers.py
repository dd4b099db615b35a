"""Where the tensors of a safetensors file lie, from its header alone: nothing of the data is read.

    u64 length | JSON: name -> {dtype, shape, data_offsets}, "__metadata__" -> strings | data

A file that is shorter or longer than its header says is refused here, when it is opened.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
LARGEST_HEADER = 100 * 10**6  # what the safetensors library accepts
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """A tensor in a file: its bytes are [start, start + num_bytes), rows one after the other."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


def read_header(path: Path, check_size: bool = True) -> tuple[dict[str, Place], dict[str, str]]:
    """(tensors by name, metadata); ValueError where the file is absent, truncated or no safetensors file.

    Without `check_size`, a file may end before its data does: to say what is missing.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        found = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if found < 8 or length > LARGEST_HEADER:
            raise ValueError(f"{path}: truncated or not a safetensors file: {found} bytes, header of {length}")
        if found < 8 + length:
            raise ValueError(f"{path}: truncated: {found} bytes, its header alone takes {8 + length}")
        text = file.read(length)
    try:
        content = json.loads(text)
        metadata = content.pop("__metadata__", {})
        tensors = {name: _place(path, name, about, 8 + length) for name, about in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a safetensors file, its header is damaged ({error!r})") from None
    expected = max([8 + length, *(place.start + place.num_bytes for place in tensors.values())])
    if check_size and found != expected:
        what = "truncated" if found < expected else "longer than its header says"
        raise ValueError(f"{path}: {what}: {found} bytes, its header describes {expected}; copy it again")
    return tensors, metadata


def _place(path: Path, name: str, about: dict, data: int) -> Place:
    begin, end = (int(at) for at in about["data_offsets"])
    place = Place(path, name, about["dtype"], tuple(int(size) for size in about["shape"]), data + begin)
    if place.dtype not in BYTES or begin < 0 or min(place.shape, default=0) < 0 or end - begin != place.num_bytes:
        raise ValueError(f"tensor {name} of {place.dtype} {list(place.shape)} cannot lie at bytes {begin} to {end}")
    return place


def find_tensor(path: Path, name: str) -> Place:
    """Tensor `name` of a file, or of a checkpoint folder: of the shard that its index names."""
    if path.is_dir():
        path = path / shard_of(path, name)
    tensors, _ = read_header(path)
    if name not in tensors:
        raise ValueError(f"{path}: no tensor {name!r}; it holds {_some(tensors)}")
    return tensors[name]


def shard_of(folder: Path, name: str) -> str:
    """The file of `folder` that holds the tensor."""
    shards = weight_map(folder)
    if name not in shards:
        raise ValueError(f"{folder}: no tensor {name!r} in its shards; they hold {_some(shards)}")
    return shards[name]


def weight_map(folder: Path) -> dict[str, str]:
    """Name of each tensor -> the file of the checkpoint folder that holds it."""
    index = folder / INDEX
    if index.is_file():
        try:
            return dict(json.loads(index.read_text("utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index}: damaged ({error!r}); copy it again") from None
    if (folder / WHOLE).is_file():
        return dict.fromkeys(read_header(folder / WHOLE)[0], WHOLE)
    raise ValueError(f"{folder} holds neither {INDEX} nor {WHOLE}: give a folder with safetensors weights")


def _some(names: dict) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{shown}, and {len(names) - 5} more" if len(names) > 5 else shown or "none"
