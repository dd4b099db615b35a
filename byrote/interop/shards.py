"""Folders of safetensors shards, as Hugging Face lays them out, read and written one tensor or one shard at a time.

model.safetensors, or model-00001-of-00003.safetensors ... and model.safetensors.index.json, which says what is where.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from byrote.tables.files.headers import INDEX, WHOLE, weight_map


def read_shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder with its name, in the order of the files; no other one is held."""
    for shard in _open_shards(folder):
        for name in shard.keys():  # noqa: SIM118  a shard is no dict
            yield name, shard.get_tensor(name)


def read_names(folder: Path) -> Iterator[str]:
    """The names alone."""
    for shard in _open_shards(folder):
        yield from shard.keys()


def _open_shards(folder: Path) -> Iterator[Any]:
    for path in (folder / file for file in sorted(set(weight_map(folder).values()))):
        try:
            with safe_open(path, framework="pt") as shard:
                yield shard
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): copy it again, with all shards") from error


def write_shards(tensors: Mapping[str, Tensor], folder: Path, max_bytes: int) -> None:
    """Write views of a model's weights; beside the model no more than one shard is in memory."""
    if list(folder.glob("*.safetensors*")):
        raise ValueError(f"{folder} holds weights already: choose another folder, or empty it")
    if max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes}: give the largest size of a shard in bytes")
    shards: list[list[str]] = [[]]
    room, total = max_bytes, 0
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= tensor.nbytes
        total += tensor.nbytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [WHOLE]
    for file, names in zip(files, shards, strict=True):
        # Cloned, because safetensors refuses views that share memory.
        save_file({name: tensors[name].detach().clone() for name in names}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        content = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
