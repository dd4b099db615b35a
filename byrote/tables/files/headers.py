"""Where the tensors of a safetensors file lie, from its header alone: nothing of the data is read.

    u64 length | JSON: name -> {dtype, shape, data_offsets}, "__metadata__" -> strings | data

A file that is shorter or longer than its header says is refused here, when it is opened. So is a header in which
tensors overlap, leave a hole or are named twice: the format allows none of it, and readers disagree on what it means.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
LARGEST_HEADER = 100 * 10**6  # what the safetensors library accepts
LFS_POINTER = b"version https://git-lfs"
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
        found, begin = os.fstat(file.fileno()).st_size, file.read(len(LFS_POINTER))
        if begin == LFS_POINTER:
            raise ValueError(f"{path}: a Git LFS pointer instead of the file; fetch that with `git lfs pull`")
        length = int.from_bytes(begin[:8], "little")
        if found < 8 or length > LARGEST_HEADER:
            raise ValueError(f"{path}: truncated or not a safetensors file: {found} bytes, header of {length}")
        if found < 8 + length:
            raise ValueError(f"{path}: truncated: {found} bytes, its header alone takes {8 + length}")
        file.seek(8)
        text = file.read(length)
    content = parse_object(text, f"{path}: not a safetensors file, its header")
    try:
        metadata = _metadata(content.pop("__metadata__", None))
        tensors = {name: _place(path, name, about, 8 + length) for name, about in content.items()}
        end = _check_order(tensors.values(), 8 + length)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a safetensors file, its header is damaged ({error!r})") from None
    if check_size and found != end:
        what = "truncated" if found < end else "longer than its header says"
        raise ValueError(f"{path}: {what}: {found} bytes, its header describes {end}; copy it again")
    return tensors, metadata


def parse_object(text: bytes, source: str) -> dict[str, Any]:
    """The JSON object in `text`; ValueError that begins with `source` where it is none, or names a key twice."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is damaged ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source} is damaged (it is no object but {_short(content)}); copy it again")
    return content


def check_fields(content: Mapping[str, Any], kinds: Mapping[str, type], source: str) -> None:
    """ValueError that begins with `source` where a field is absent or of another type, or a number is negative."""
    for name, kind in kinds.items():
        value = content.get(name)
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            wanted = "int of 0 or more" if kind is int else kind.__name__
            raise ValueError(f"{source} is damaged ({name} must be {wanted}, got {_short(value)}); copy it again")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def _metadata(found: Any) -> dict[str, str]:
    """None, as some tools write it, is none."""
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"__metadata__ must hold strings by name, got {_short(found)}")
    return found


def _place(path: Path, name: str, about: dict, data: int) -> Place:
    begin, end = about["data_offsets"]
    shape = about["shape"]
    if any(type(number) is not int for number in (begin, end, *shape)):
        raise ValueError(f"tensor {name}: shape and data_offsets must be integers, got {_short([shape, begin, end])}")
    place = Place(path, name, about["dtype"], tuple(shape), data + begin)
    if place.dtype not in BYTES or begin < 0 or min(shape, default=0) < 0 or end - begin != place.num_bytes:
        raise ValueError(f"tensor {name} of {place.dtype} {shape} cannot lie at bytes {begin} to {end}")
    return place


def _check_order(places: Iterable[Place], data: int) -> int:
    """Where the last tensor ends; ValueError unless each begins where the one before it ends."""
    end = data
    for place in sorted(places, key=lambda place: (place.start, place.num_bytes)):
        if place.start != end:
            kind = "overlaps the tensor before it" if place.start < end else "leaves a hole before it"
            raise ValueError(f"tensor {place.name} {kind}: it begins at byte {place.start - data}, not {end - data}")
        end += place.num_bytes
    return end


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
        content = parse_object(index.read_bytes(), str(index))
        check_fields(content, {"weight_map": dict}, str(index))
        for name, file in content["weight_map"].items():
            # A name that leads elsewhere would have files read that are no part of the checkpoint.
            if not isinstance(file, str) or file in ("", ".", "..") or set(file) & {"/", "\\", "\0"}:
                raise ValueError(f"{index}: {name} is said to lie in {file!r}; shards are files beside the index")
        return content["weight_map"]
    if (folder / WHOLE).is_file():
        return dict.fromkeys(read_header(folder / WHOLE)[0], WHOLE)
    raise ValueError(f"{folder} holds neither {INDEX} nor {WHOLE}: give a folder with safetensors weights")


def check_weights(folder: Path) -> None:
    """ValueError that names the first file of safetensors weights in `folder` that is absent, truncated or damaged."""
    if (folder / INDEX).is_file() or (folder / WHOLE).is_file():
        for file in sorted(set(weight_map(folder).values())):
            read_header(folder / file)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _some(names: dict) -> str:
    shown = ", ".join(sorted(names)[:5])
    return f"{shown}, and {len(names) - 5} more" if len(names) > 5 else shown or "none"
