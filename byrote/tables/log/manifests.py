"""Generations of a log: which parts of which segments are its content at a committed moment.

    FOLDER/manifest-000000012.json   {format_version, generation, segments: [[number, bytes], ...], crc}

A generation is the first `bytes` of each of these segments, in order; `crc` is the CRC-32 of the rest as sorted JSON.
A manifest is put in place by a rename: it is there whole, and the segments that it names are on the disk, or it is not.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from byrote.tables.log import disk

FORMAT_VERSION = 1


def generations(folder: Path) -> list[int]:
    """The committed ones, ascending."""
    matches = (re.fullmatch(r"manifest-(\d+)\.json", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def read(folder: Path, generation: int) -> list[tuple[int, int]]:
    """(segment, bytes), ascending."""
    path = _path(folder, generation)
    content = disk.read_json(path, FORMAT_VERSION, {"segments": list, "crc": int}, "no such generation")
    if content.pop("crc") != _crc(content) or not all(map(_is_part, content["segments"])):
        raise ValueError(f"{path} is damaged; open another generation of {generations(folder)}")
    return [(segment, length) for segment, length in content["segments"]]


def _is_part(part: Any) -> bool:
    return isinstance(part, list) and len(part) == 2 and all(type(number) is int and number >= 0 for number in part)


def write(folder: Path, generation: int, segments: Iterable[tuple[int, int]]) -> None:
    content = {
        "format_version": FORMAT_VERSION,
        "generation": generation,
        "segments": sorted(list(part) for part in segments),
    }
    disk.replace_json(_path(folder, generation), {**content, "crc": _crc(content)})


def delete(folder: Path, dropped: Iterable[int]) -> None:
    """For good, when it returns: a manifest must never outlive its segments."""
    dropped = list(dropped)
    for generation in dropped:
        disk.delete(_path(folder, generation))
    if dropped:
        disk.sync_folder(folder)


def needed(folder: Path) -> dict[int, int]:
    """Of each segment that a generation names, the most bytes that one does."""
    lengths: dict[int, int] = {}
    for generation in generations(folder):
        for segment, length in read(folder, generation):
            lengths[segment] = max(length, lengths.get(segment, 0))
    return lengths


def _path(folder: Path, generation: int) -> Path:
    return folder / f"manifest-{generation:09d}.json"


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
