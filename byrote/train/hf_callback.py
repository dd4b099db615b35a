"""Tables under the stock transformers Trainer: one callback, `TableCallback()`.

The Trainer saves tables by itself (they belong to `save_pretrained`) but brings back only the backbone: on resume and
when it reloads the best model. The callback has the row state saved with them, and then brings back both. Without it
the first forward after such a reload raises, because the backbone's generation is not the table's. The optimizer may be
`byrote.train.Optimizer`, the Trainer's own, or any other that moves rows (`byrote.memory.row_step`).

    OUTPUT_DIR/checkpoint-200/           rows and row state; with placement="file" a pointer of a line a table
               tables/                   with placement="file": the base, written once, and the log of changed rows

All of that is written by `save_pretrained`, before the Trainer removes older checkpoints. With "file"
(`file_tables.py`) what those alone pointed to is collected afterwards. A crash in between leaves more than is needed,
never less.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from byrote.memory import Memory
from byrote.models.pretrained import MemoryPreTrainedModel
from byrote.tables.placements.open import POINTER
from byrote.train import file_tables

FOLDERS = f"{PREFIX_CHECKPOINT_DIR}-*"


class TableCallback(TrainerCallback):
    """`resume_from_checkpoint`: the folder given to `trainer.train`; needed only if it is not in the output folder.

    `placement`: "host" trains the tables in RAM; "file" trains them from files in the output folder, where a checkpoint
    costs what was changed since the last one and is good there only.
    """

    def __init__(
        self, resume_from_checkpoint: str | os.PathLike[str] | None = None, *, placement: str = "host"
    ) -> None:
        if placement not in ("host", "file"):
            raise ValueError(f"placement must be 'host' or 'file', got {placement!r}")
        self.resume_from_checkpoint, self.placement = resume_from_checkpoint, placement
        self._from_files = False

    def on_save(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        if self._from_files:
            file_tables.collect(_model(model), Path(str(args.output_dir)), FOLDERS)

    def on_train_begin(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        found, run = _model(model), Path(str(args.output_dir))
        if found.memory_stack is not None and found.memory_stack.sharded:
            raise ValueError(
                "the stock Trainer saves on one process, and all must save sharded tables: use `byrote train`, "
                "or placement='host'"
            )
        file_tables.mark_checkpoints(found, run, FOLDERS)
        if not any(memory.anchor.requires_grad for memory in _memories(found)):
            return  # the tables do not move
        self._from_files = self.placement == "file"
        if state.global_step:
            given = self.resume_from_checkpoint or args.resume_from_checkpoint
            folders = [Path(given)] if isinstance(given, str | os.PathLike) else []
            self._bring_back(found, [*folders, *run.glob(FOLDERS)])
            if self._from_files:
                file_tables.resume(found, run, FOLDERS)
        elif self._from_files:
            optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # accelerate wraps it
            file_tables.begin(found, run, optimizer, FOLDERS)

    def on_train_end(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        found, run = _model(model), Path(str(args.output_dir))
        reloaded = any(memory.difference(memory.table) for memory in _memories(found))
        if reloaded and state.best_model_checkpoint is not None:
            self._bring_back(found, [Path(state.best_model_checkpoint)])
        if self._from_files:
            file_tables.resume(found, run, FOLDERS)  # the Trainer may have removed the last checkpoint too
        file_tables.end(found)

    def _bring_back(self, model: MemoryPreTrainedModel, folders: list[Path]) -> None:
        """Load tables and row state of the folder whose generation is the backbone's."""
        before, reasons = file_tables.tables(model).values(), []
        file_tables.unlock(model)
        for folder in folders:
            try:
                model.load_tables(folder, self.placement)
            except ValueError as error:
                reasons.append(str(error))  # another moment of the training, or damage
                continue
            for table in before:
                table.close()
            pointers = [path.name for path in folder.glob(f"table-*{POINTER}")]
            if bool(pointers) != (self.placement == "file"):
                kind = "pointers to tables in files" if pointers else "whole tables"
                raise ValueError(f"{folder} holds {kind}: resume with {'file' if pointers else 'host'!r} as placement")
            if not pointers:
                model.load_row_state(folder)
            return
        raise ValueError(
            f"no checkpoint among {[str(folder) for folder in folders]} holds the tables of the loaded backbone: "
            f"pass TableCallback(resume_from_checkpoint=folder). {'; '.join(reasons)}"
        )


def _model(model: nn.Module) -> MemoryPreTrainedModel:
    return next(module for module in model.modules() if isinstance(module, MemoryPreTrainedModel))


def _memories(model: MemoryPreTrainedModel) -> list[Memory]:
    return [] if model.memory_stack is None else [memory for _, memory in model.memory_stack.items()]
