"""The files of a saved model: found in a folder or on the hub, checked before they are opened, replaced when saved."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from byrote.tables.files.headers import check_weights, parse_object


def remove_weights(folder: Path, variant: str | None) -> None:
    """Weights of an earlier save, in one file or in shards, which would be read beside those that come."""
    variant = f".{re.escape(variant)}" if variant else ""
    ours = re.compile(rf"model{variant}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{variant}\.json")
    for file in folder.iterdir():
        if ours.fullmatch(file.name):
            file.unlink()


def check_folder(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> None:
    """ValueError that names the file of a saved folder that is absent or damaged."""
    if not os.path.isdir(name):
        return
    if "config" not in kwargs:
        config = resolve(name, "config.json", kwargs)
        if not config.is_file():  # transformers would go on with the default config
            raise ValueError(f"{name} holds no config.json, which is written last: the save did not come to its end")
        parse_object(config.read_bytes(), str(config))
    check_weights(resolve(name, "", kwargs))


def base_of_adapter(name: str | os.PathLike[str]) -> str | None:
    """What the adapter in a folder was trained on; None where the folder holds a model, or is none."""
    adapter = Path(name, "adapter_config.json")
    if not adapter.is_file() or Path(name, "config.json").is_file():
        return None
    return parse_object(adapter.read_bytes(), str(adapter)).get("base_model_name_or_path")


def resolve(name: str | os.PathLike[str], file: str, hub: dict[str, Any]) -> Path:
    """`file` of a folder, or of a repository on the hub."""
    if os.path.isdir(name):
        return Path(name, hub.get("subfolder") or "", file)
    return Path(str(cached_file(str(name), file, **hub)))
