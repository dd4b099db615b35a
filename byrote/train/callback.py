"""Tables under the stock transformers Trainer: one callback, `TableCallback()`.

The Trainer saves tables by itself (they belong to `save_pretrained`) but brings back only the backbone: on resume and
when it reloads the best model. The callback also saves the row state, and then brings back both. Without it the first
forward after such a reload raises, because the backbone's generation is not the table's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from byrote.memory import Memory
from byrote.models.engram import EngramForCausalLM


class TableCallback(TrainerCallback):
    """`resume_from_checkpoint`: the folder given to `trainer.train`; needed only if it is not in the output folder."""

    def __init__(self, resume_from_checkpoint: str | os.PathLike[str] | None = None) -> None:
        self.resume_from_checkpoint = resume_from_checkpoint

    def on_save(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            _engram(model).save_row_state(Path(str(args.output_dir), f"checkpoint-{state.global_step}"))

    def on_train_begin(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        engram = _engram(model)
        if engram.memory_stack is not None and engram.memory_stack.sharded:
            raise ValueError(
                "the stock Trainer saves on one process, and all must save sharded tables: use `byrote train`, "
                "or placement='host'"
            )
        if state.global_step == 0 or not any(memory.anchor.requires_grad for memory in _memories(engram)):
            return  # nothing is resumed, or the tables do not move
        given = self.resume_from_checkpoint or args.resume_from_checkpoint
        folders = [Path(given)] if isinstance(given, str | os.PathLike) else []
        _bring_back(engram, [*folders, *Path(str(args.output_dir)).glob("checkpoint-*")])

    def on_train_end(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        engram = _engram(model)
        reloaded = any(int(memory.generation) != memory.table.generation for memory in _memories(engram))
        if reloaded and state.best_model_checkpoint is not None:
            _bring_back(engram, [Path(state.best_model_checkpoint)])


def _engram(model: nn.Module) -> EngramForCausalLM:
    return next(module for module in model.modules() if isinstance(module, EngramForCausalLM))


def _memories(model: EngramForCausalLM) -> list[Memory]:
    return [] if model.model.memories is None else [memory for _, memory in model.model.memories.items()]


def _bring_back(model: EngramForCausalLM, folders: list[Path]) -> None:
    """Load tables and row state of the folder whose generation is the backbone's."""
    for folder in folders:
        try:
            model.load_tables(folder)
        except ValueError:
            continue  # another moment of the training
        model.load_row_state(folder)
        return
    raise ValueError(
        f"no checkpoint among {[str(folder) for folder in folders]} holds the tables of the loaded backbone: "
        "pass TableCallback(resume_from_checkpoint=folder)"
    )
