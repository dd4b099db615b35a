"""MemoryPreTrainedModel: what all models with memories share, initialization and folders that hold a whole model.

Tables are not parameters: `save_pretrained` and `from_pretrained` write and open them beside the backbone.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from byrote.memory import Memory, MemoryStack
from byrote.memory.memory import NO_GENERATION
from byrote.models.configuration import MemoryConfig
from byrote.models.folder import base_of_adapter, check_folder, remove_weights, resolve
from byrote.models.hf import saves_adapter
from byrote.models.initialization import initialize
from byrote.models.words import nearest
from byrote.nn.boundary import BoundaryHead
from byrote.nn.hyper import GatedExit, HyperConnection, ManifoldConnection
from byrote.nn.router import Router
from byrote.tables import Table
from byrote.tables.files.checksums import write_sums
from byrote.tables.placements.open import POINTER, cached, check_placement, move, open_table

# What is computed in float32 whatever the rest is in, and loses what it was trained to in half precision.
EXACT = (HyperConnection, ManifoldConnection, GatedExit, BoundaryHead)


class MemoryPreTrainedModel(PreTrainedModel):
    """A model that may hold memories: its tables are saved and opened with it, and are no part of `state_dict`."""

    config: MemoryConfig  # type: ignore[assignment]
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: MemoryConfig, *inputs: Any, **kwargs: Any) -> None:
        config.check()
        if peft := sys.modules.get("peft"):  # LoRA without target_modules goes to the projections of attention
            targets = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            targets.setdefault(config.model_type, ["q_proj", "q_b_proj", "kv_b_proj", "v_proj", "o_proj"])
        super().__init__(config, *inputs, **kwargs)

    def post_init(self) -> None:
        # By what this model has, since a name that nothing bears keeps nothing exact.
        named = self.named_modules()
        exact = {name.rpartition(".")[2] for name, module in named if isinstance(module, EXACT) and module.state_dict()}
        routed = any(isinstance(module, Router) for module in self.modules())
        self._keep_in_fp32_modules_strict = exact | ({"selection_bias"} if routed else set())
        super().post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self._std(module))

    def _std(self, module: nn.Module) -> float:
        """Under muP that of hidden matrices is divided by the root of s."""
        return self.config.initializer_range / getattr(module, "mup_scale", 1.0) ** 0.5

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        """What a forward keeps its keys and values in: the cache that it was given, or a new one if it is to.

        `use_cache` None: as the config says, but while something is learned none is made, which nobody would read.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not (self.training and torch.is_grad_enabled())
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

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As transformers', and the addresses with it: new ids are classes of their own in the vocabulary map, and no
        row moves. Tables are to be in RAM.
        """
        if pad_to_multiple_of is not None and not isinstance(
            pad_to_multiple_of, int
        ):  # transformers says what is wrong
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size, step = new_num_tokens or self.config.vocab_size, pad_to_multiple_of or 1
        size = -(-size // step) * step
        pad = self.config.memory_pad_token_id
        if self.memory_stack is not None and size != self.config.vocab_size:
            if size <= pad:
                raise ValueError(f"{size} tokens would be without memory_pad_token_id={pad}: keep at least {pad + 1}")
            self.memory_stack.resize(size)
            self.config.address = self.memory_stack.spec.to_dict()
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, tables: bool = True, checksums: bool = False, **kwargs: Any
    ) -> None:
        """Backbone, then tables, then the config: a folder with a config is complete, also one that is written over.

        `tables=False` leaves the tables out, for who stores them elsewhere. `checksums=True` writes those of each
        table beside it, for `byrote table verify`. With sharded tables all ranks call it, and rank 0 writes. Of a model
        with `add_adapter` the adapter alone is written; ValueError where rows were trained beside it.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub would upload the backbone before its tables: call model.push_to_hub(name)")
        folder, stack = Path(save_directory), self.memory_stack
        if saves_adapter(self):
            self._check_rows_of_adapter()
            return super().save_pretrained(folder, **kwargs)
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
            remove_weights(folder, kwargs.get("variant"))
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

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """ValueError where a PEFT model asks for it, to save an adapter, and rows were trained beside that."""
        if kwargs.get("prefix") and hasattr(self, "peft_config"):
            self._check_rows_of_adapter()
        return super().state_dict(*args, **kwargs)

    def _check_rows_of_adapter(self) -> None:
        memories = [] if self.memory_stack is None else self.memory_stack.items()
        if trained := [layer for layer, memory in memories if memory.moved and memory.anchor.requires_grad]:
            raise ValueError(
                f"the rows of the tables of layers {trained} were trained beside an adapter, whose folder holds no "
                "rows: save the whole model (a PeftModel: model.merge_and_unload().save_pretrained(folder)), or freeze "
                "the tables before an adapter is trained: model.memory_stack.requires_grad_(False)"
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
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

        With None, `config=` and `state_dict=` the weights are those of the state dict, and the tables are new.
        """
        name = pretrained_model_name_or_path
        if name is None:
            if placement != "host":
                raise ValueError(f"placement={placement!r} opens tables of a folder: name one, or leave placement out")
            return super().from_pretrained(None, *args, **kwargs)
        check_placement(placement, cache)  # before anything is loaded
        fields = cls.config_class.own_fields()  # type: ignore[union-attr]
        for word in kwargs:
            if word not in fields and (near := nearest(word, fields, cutoff=0.7)):
                raise ValueError(f"{word} is no field of the config: did you mean {near}?")
        whole = base_of_adapter(name) or name  # transformers opens that and puts the adapter on it
        check_folder(whole, kwargs)
        told = kwargs.pop("output_loading_info", False)
        model: Any
        info: Any
        model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if missing := sorted(key for key in info["missing_keys"] if key.endswith(".vocabulary")):
            raise ValueError(
                f"{name}: the weights lack {missing}, the map from token ids to classes; a tool that keeps only names "
                "it knows leaves it out: take the weights that save_pretrained wrote"
            )
        for prefix, module in model.named_modules():
            if isinstance(module, Memory):
                module.forget({key for key in ("generation", "identity") if f"{prefix}.{key}" in info["missing_keys"]})
        _align(model)
        hub: dict[str, Any] = {
            key: kwargs[key]
            for key in ("revision", "token", "cache_dir", "local_files_only", "subfolder")
            if key in kwargs
        }
        tables = move(model._opened(lambda file: resolve(whole, file, hub), placement), placement)
        model._put(tables if cache is None or not tables else cached(tables, cache))
        return (model, info) if told else model

    def load_tables(self, folder: str | os.PathLike[str], placement: str = "host") -> None:
        """Open the tables in `folder`, which `save_pretrained` wrote, in place of the present ones.

        `placement`: "host" or "file", as in `from_pretrained`; tables that are sharded, pinned or on a device stay so.
        """
        present = [] if self.memory_stack is None else [memory.table for _, memory in self.memory_stack.items()]
        settled = any(table.settled for table in present)
        tables = self._opened(lambda file: Path(folder) / file, "host" if settled else placement)
        self._put([before.place(table) for before, table in zip(present, tables, strict=True)])

    def _opened(self, find: Callable[[str], Path], placement: str) -> list[Table]:
        """The tables that belong to this backbone."""
        stack, tables = self.memory_stack, []
        if stack is None:
            return []
        for layer_id, memory in stack.items():
            path, num_rows = find(stack.table_path(Path(), layer_id).name), stack.spec.layer(layer_id).rows
            width, digest = self.config.memory_row_width, stack.spec.digest
            table = open_table(path, placement, num_rows=num_rows, width=width, digest=digest)
            if int(memory.generation) == NO_GENERATION:
                warnings.warn(
                    f"{path}: taken on trust, since the backbone was saved without the generation of its table (by "
                    "another tool?); save both again with save_pretrained",
                    stacklevel=4,
                )
            elif difference := memory.difference(table):
                raise ValueError(f"{path}: {difference}; take both from one save_pretrained")
            tables.append(table)
        return tables

    def _put(self, tables: Sequence[Table]) -> None:
        if self.memory_stack is not None:
            for (_, memory), table in zip(self.memory_stack.items(), tables, strict=True):
                memory.table = table
                memory.generation.fill_(table.generation)  # which the backbone may have been loaded without

    def save_row_state(self, folder: str | os.PathLike[str]) -> None:
        """Write the update-rule state of the rows: what a checkpoint needs beside `save_pretrained`."""
        if self.memory_stack is not None:
            self.memory_stack.save_row_state(Path(folder))

    def load_row_state(self, folder: str | os.PathLike[str]) -> None:
        """Read back what `save_row_state` wrote."""
        if self.memory_stack is not None:
            self.memory_stack.load_row_state(Path(folder))


def _align(model: nn.Module) -> None:
    """Move tensors out of a mapped file where they begin at an odd address: there the vector units of a CPU sum a
    product in another order, and what is loaded would not be what was saved to the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.data) is Tensor and tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
