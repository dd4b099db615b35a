"""MemoryPreTrainedModel: what all models with memories share, initialization and folders that hold a whole model.

Tables are not parameters: `save_pretrained` and `from_pretrained` write and open them beside the backbone.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import cached_file

from byrote.memory import Memory, MemoryStack
from byrote.memory.stack import NO_GENERATION, POINTER
from byrote.models.configuration import MemoryConfig
from byrote.models.initialization import initialize
from byrote.tables import RamTable, Table
from byrote.tables.cache import CachedTable, num_bytes
from byrote.tables.checksums import write_sums
from byrote.tables.device import accelerator
from byrote.tables.file import FileTable
from byrote.tables.logged import LoggedTable
from byrote.tables.pinned import check_gpu

PLACEMENTS = ("host", "pinned", "device", "file", "sharded")


class MemoryPreTrainedModel(PreTrainedModel):
    config: MemoryConfig  # type: ignore[assignment]
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self._std(module))

    def _std(self, module: nn.Module) -> float:
        """Under muP that of hidden matrices is divided by the root of s."""
        return self.config.initializer_range / getattr(module, "mup_scale", 1.0) ** 0.5

    def _cache(self, cache: Cache | None, use_cache: bool) -> Cache | None:
        """What a forward keeps its keys and values in: the cache that it was given, or a new one if it is to."""
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise ValueError("past_key_values cannot be filled under gradient checkpointing: pass use_cache=False")
            return None
        return DynamicCache(config=self.config) if use_cache and cache is None else cache  # type: ignore[arg-type]

    @property
    def memory_stack(self) -> MemoryStack | None:
        """All memories of the model; None without any."""
        return self.base_model.memories  # type: ignore[return-value]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self.memory_stack is not None:
            self.memory_stack.drop_pending()

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, tables: bool = True, checksums: bool = False, **kwargs: Any
    ) -> None:
        """Backbone, then tables, then the config: a folder with a config is complete, also one that is written over.

        `tables=False` leaves the tables out, for who stores them elsewhere. `checksums=True` writes those of each
        table beside it, for `byrote table verify`. With sharded tables all ranks call it, and rank 0 writes.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub would upload the backbone before its tables: call model.push_to_hub(name)")
        folder, stack = Path(save_directory), self.memory_stack
        if stack is not None and stack.sharded and dist.get_rank() > 0:
            if tables:
                stack.save_tables(folder)  # hands its rows to rank 0, and writes nothing
            return
        if not kwargs.get("is_main_process", True):
            super().save_pretrained(folder, **kwargs)  # gives its part, and writes nothing
            return
        aside = folder / ".saving"
        shutil.rmtree(aside, ignore_errors=True)
        super().save_pretrained(aside, **kwargs)
        config = aside / "config.json"
        if config.exists():  # else an adapter is saved alone
            (folder / config.name).unlink(missing_ok=True)
            _remove_weights(folder, kwargs.get("variant"))
        for file in aside.iterdir():
            if file != config:
                os.replace(file, folder / file.name)
        if config.exists():
            if stack is not None and tables:
                for layer_id, _ in stack.items():
                    stack.table_path(folder, layer_id).with_suffix(POINTER).unlink(missing_ok=True)
                stack.save_tables(folder)
                for layer_id, _ in stack.items() if checksums else ():
                    write_sums(stack.table_path(folder, layer_id))
            os.replace(config, folder / config.name)
        aside.rmdir()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | os.PathLike[str],
        *args: Any,
        placement: str = "host",
        cache: int | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model with its tables open; ValueError where a table is missing, truncated or another model's.

        `placement`: where the tables live; "host" is RAM, "pinned" RAM that a GPU reads by itself, "device" an
        accelerator, "file" leaves them in their files, to be read and not trained. Each follows a checkpoint of a
        file-table run to the run's log. "sharded" spreads the rows over the ranks of the process group, which all call
        it. `cache`: bytes of RAM, as 64_000_000 or "64MB", for the rows of tables in files that are read most, shared
        among the tables.
        """
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(map(repr, PLACEMENTS))}, got {placement!r}")
        if placement == "device":
            accelerator()  # before anything is loaded
        if placement == "pinned":
            check_gpu()
        if cache is not None and placement != "file":
            raise ValueError(f"cache={cache!r} keeps rows of files in RAM: give it with placement='file'")
        if os.path.isdir(name) and "config" not in kwargs and not _resolve(name, "config.json", kwargs).is_file():
            # transformers would go on with the default config.
            raise ValueError(f"{name} holds no config.json, which is written last: the save did not come to its end")
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        for prefix, module in model.named_modules():
            if isinstance(module, Memory):
                module.forget({key for key in ("generation", "identity") if f"{prefix}.{key}" in info["missing_keys"]})
        _align(model)
        hub: dict[str, Any] = {
            key: kwargs[key]
            for key in ("revision", "token", "cache_dir", "local_files_only", "subfolder")
            if key in kwargs
        }
        model._open_tables(lambda file: _resolve(name, file, hub), placement)
        if cache is not None and model.memory_stack is not None:
            memories = [memory for _, memory in model.memory_stack.items()]
            for memory in memories:
                memory.table = CachedTable(memory.table, num_bytes(cache) // len(memories))
        return (model, info) if wants_info else model

    def load_tables(self, folder: str | os.PathLike[str], placement: str = "host") -> None:
        """Open the tables in `folder`, which `save_pretrained` wrote, in place of the present ones.

        `placement`: "host" or "file", as in `from_pretrained`; tables that are sharded, pinned or on a device stay so.
        """
        stack = self.memory_stack
        if stack is not None and (stack.sharded or stack.pinned or stack.device is not None):
            placement = "sharded" if stack.sharded else "pinned" if stack.pinned else "device"
        self._open_tables(lambda file: Path(folder) / file, placement)

    def _open_tables(self, find: Callable[[str], Path], placement: str = "host") -> None:
        stack = self.memory_stack
        if stack is None:
            return
        device, opened = stack.device, []
        for layer_id, memory in stack.items():
            path = find(stack.table_path(Path(), layer_id).name)
            rows = stack.spec.layer(layer_id).rows
            table = _open_table(path, placement, rows, self.config.memory_row_width, stack.spec.digest)
            if int(memory.generation) == NO_GENERATION:
                warnings.warn(
                    f"{path}: taken on trust, since the backbone was saved without the generation of its table (by "
                    "another tool?); save both again with save_pretrained",
                    stacklevel=4,
                )
            elif int(memory.generation) != table.generation:
                raise ValueError(
                    f"{path}: generation {table.generation}, the backbone was saved with "
                    f"{int(memory.generation)}: take both from one save_pretrained"
                )
            elif difference := memory.difference(table):
                raise ValueError(f"{path}: {difference}; take both from one save_pretrained")
            opened.append((memory, table))
        for memory, table in opened:  # all or none
            memory.table = table
            memory.generation.fill_(table.generation)
        if placement == "sharded":
            stack.shard()
        elif placement == "pinned":
            stack.pin()
        elif placement == "device":
            stack.to_device(device or accelerator())

    def save_row_state(self, folder: str | os.PathLike[str]) -> None:
        """Write the update-rule state of the rows: what a checkpoint needs beside `save_pretrained`."""
        if self.memory_stack is not None:
            self.memory_stack.save_row_state(Path(folder))

    def load_row_state(self, folder: str | os.PathLike[str]) -> None:
        """Read back what `save_row_state` wrote."""
        if self.memory_stack is not None:
            self.memory_stack.load_row_state(Path(folder))


def _open_table(path: Path, placement: str, num_rows: int, width: int, digest: str) -> Table:
    """The table in `path`, or the one that the pointer beside it names."""
    pointer = path.with_suffix(POINTER)
    if pointer.is_file():
        logged = LoggedTable.open(pointer, num_rows=num_rows, width=width, digest=digest)
        return logged if placement == "file" else logged.in_memory()
    opened: type[FileTable] | type[RamTable] = FileTable if placement == "file" else RamTable
    return opened.open(path, num_rows=num_rows, width=width, digest=digest)


def _align(model: nn.Module) -> None:
    """Move tensors out of a mapped file where they begin at an odd address: there the vector units of a CPU sum a
    product in another order, and what is loaded would not be what was saved to the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) is Tensor and tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _remove_weights(folder: Path, variant: str | None) -> None:
    """Weights of an earlier save, in one file or in shards, which would be read beside those that come."""
    variant = f".{re.escape(variant)}" if variant else ""
    ours = re.compile(rf"model{variant}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{variant}\.json")
    for file in folder.iterdir():
        if ours.fullmatch(file.name):
            file.unlink()


def _resolve(name: str | os.PathLike[str], file: str, hub: dict[str, Any]) -> Path:
    """`file` of a folder, or of a repository on the hub."""
    if os.path.isdir(name):
        return Path(name, hub.get("subfolder") or "", file)
    return Path(str(cached_file(str(name), file, **hub)))
