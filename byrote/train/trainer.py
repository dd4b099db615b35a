"""The training loop. One optimizer step, on any number of processes and micro-batches:

    N = predicted tokens of the step's batch, over all of its rows on all processes
    each micro-batch: loss = sum of its nats / (N / world), backward; DDP then averages over the processes
    clip the norm of the dense gradient; optimizer.step(); schedule

so the gradient is that of the mean over N tokens, however the rows were split. Where concepts are learned, the loss
that holds their rate needs the boundaries of the whole step; with several micro-batches the encoder runs once more to
draw them first (byrote.nn.boundary). Nothing depends on the
clock (unless `max_seconds` is set), and all randomness is in the checkpoint: a resumed run equals the
uninterrupted one to the last bit.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from byrote.data.loader import Loader
from byrote.data.packing import Batch, predicted
from byrote.memory import Memory
from byrote.train import file_tables
from byrote.train.checkpoint import load_training, random_states, restore_random_states, save_checkpoint, sharded
from byrote.train.evaluate import Score, Validation, evaluate, loss_options
from byrote.train.metrics import Metrics
from byrote.train.recipe import TrainRecipe
from byrote.train.schedule import mtp_weight, schedule
from byrote.train.signals import Signals

BUDGET = "the time budget ended"


class Interrupted(Exception):
    """A signal, or the time budget, stopped the run after a whole step; its checkpoint is saved."""

    def __init__(self, reason: str, step: int, checkpoint: Path):
        super().__init__(f"{reason} after step {step}; saved {checkpoint}")
        self.reason, self.step, self.checkpoint = reason, step, checkpoint


@dataclass(frozen=True)
class Result:
    """What a run ends with."""

    score: Score
    tokens: int
    seconds: float  # of training steps: evaluation and saving are not in it
    checkpoint: Path


class Trainer:
    """Trains `model` in the folder `run`. With a checkpoint, `model` must have been loaded from it.

    `report(record)` is called after each step and each evaluation, with a record as in metrics.jsonl;
    `evaluating(done, total)` after each batch of an evaluation.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        model: Any,
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        validation: Validation,
        run: Path,
        tokenizer: Any = None,
        checkpoint: Path | None = None,
        report: Callable[[dict[str, Any]], None] = lambda record: None,
        evaluating: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.recipe, self.model, self.optimizer, self.loader = recipe, model, optimizer, loader
        self.validation, self.run, self.tokenizer = validation, run, tokenizer
        self.report, self.evaluating = report, evaluating
        self.held = contextlib.ExitStack()  # what is to be given back when training ends, however it ends
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = next(model.parameters()).device
        self.options = loss_options(model)
        config = model.config
        # Other models' configs may name prediction modules too, but their forward knows no weight.
        self.predicts = hasattr(config, "mtp_loss_weight") and config.num_nextn_predict_layers > 0
        self.pools = getattr(config, "num_concept_layers", 0) > 0
        self.schedule = schedule(optimizer, recipe)
        self.step, self.seconds, self.saved = 0, 0.0, checkpoint
        self.evaluated = 0  # the step of the last evaluation on the way
        self.signals = Signals()
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if checkpoint:
            self._restore(checkpoint)
        self.parallel: nn.Module = DistributedDataParallel(model) if self.world > 1 else model
        self._before = self.seconds
        last = self.step == recipe.steps
        self.metrics = Metrics(run / "metrics.jsonl", self.step, last) if self.rank == 0 else None

    def train(self) -> Result:
        """Train to the recipe's last step, save, and evaluate. Interrupted where a signal or the time budget stops it;
        a run that was stopped in its last evaluation goes on with that.
        """
        self.model.train()
        with self.held, self.signals, file_tables.released(self.model):
            self._evaluate_on_the_way()  # where a signal came between a step and its evaluation
            while self.step < self.recipe.steps:
                reason = self._train_step()
                last = self.step == self.recipe.steps
                if reason and not (last and reason == BUDGET):
                    raise Interrupted(reason, self.step, self.save())
                self._evaluate_on_the_way()
                if last or _due(self.step, self.recipe.checkpoint_every):
                    self.saved = self.save()
            assert self.saved is not None
            score = self._evaluate(0, self._last_evaluation)
        self.loader.close()
        return Result(score, self.tokens, self.seconds, self.saved)

    @property
    def tokens(self) -> int:
        return self.step * self.loader.packer.batch_size * self.loader.packer.length

    def save(self) -> Path:
        """Write a checkpoint of this moment, between two steps. All ranks call it; rank 0 writes.

        Ranks with a share of the tables hand it over.
        """
        states: list[Any] = [random_states()]
        if self.world > 1:
            states = [None] * self.world
            dist.all_gather_object(states, random_states())
        training = {
            "step": self.step,
            "seconds": self.seconds,
            "evaluated": self.evaluated,
            "loader": self.loader.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": states,
        }
        saved = [""]
        if self.rank == 0 or sharded(self.model):
            path = save_checkpoint(self.run, self.step, self.model, self.tokenizer, training, self.recipe.keep)
            saved = [str(path)]
        if self.world > 1:
            dist.broadcast_object_list(saved)
        return Path(saved[0])

    def _restore(self, checkpoint: Path) -> None:
        training = load_training(checkpoint, self.model)
        before = len(training["random"])
        if before != self.world and not sharded(self.model):
            raise ValueError(f"{checkpoint} was written by {before} processes, not {self.world}; resume with as many")
        self.step, self.seconds = training["step"], training["seconds"]
        self.evaluated = training.get("evaluated", self.step)
        self.loader.load_state_dict(training["loader"])
        self.optimizer.load_state_dict(training["optimizer"])
        self.schedule.load_state_dict(training["schedule"])
        # byrote itself draws from none of them: another number of ranks goes on with the same batches.
        restore_random_states(training["random"][self.rank % before])

    def _train_step(self) -> str:
        """One optimizer step; returns why to stop, or nothing."""
        began = time.perf_counter()
        batch = next(self.loader)
        facts = torch.tensor([predicted(batch), bool(self.signals.noted), self._overdue()], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(facts)
        items, stopped, overdue = facts.tolist()
        total, further = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        options: dict[str, Any] = {**self.options, "num_items_in_batch": items / self.world, "use_cache": False}
        weight = mtp_weight(self.step, self.recipe)
        if self.predicts:
            options["mtp_loss_weight"] = weight
        parts = self._micro_batches(batch)
        if self.pools and len(parts) > 1:
            options["boundary_counts"] = self._draw_boundaries(parts)
        boundaries = torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            with self._no_exchange() if i < len(parts) - 1 else contextlib.nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
                    # Without a cache: given one, Hugging Face models do not keep packed documents apart.
                    outputs = self.parallel(**part, **options)
                outputs.loss.backward()
            total += outputs.loss.detach()
            if self.predicts:
                further += outputs.mtp_loss
                total -= weight * outputs.mtp_loss
            if self.pools:
                boundaries += outputs.boundaries.sum()
                if outputs.parser_loss is not None:
                    total -= self.model.config.boundary_weight * outputs.parser_loss
        sums = torch.stack([total, further, boundaries])
        if self.world > 1:
            dist.all_reduce(sums)
        loss, mtp_loss, concepts = (sums / self.world).tolist()
        norm = self._clip()
        if not math.isfinite(norm):
            raise ValueError(
                f"the gradient is not finite at step {self.step + 1} (loss {loss:.4g}); "
                "lower train.learning_rate, or raise train.warmup, and start from an earlier checkpoint"
            )
        rates = self.schedule.get_last_lr()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        took = time.perf_counter() - began
        self.seconds += took
        self._log(loss, mtp_loss, concepts * self.world, float(rates[0]), norm, took)
        return (self.signals.noted or "a signal") if stopped else BUDGET if overdue else ""

    def _clip(self) -> float:
        """Clip the dense gradient by its norm, which is returned. Rows follow their anchors, and are left out."""
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        anchors = {id(memory.anchor) for memory in self.model.modules() if isinstance(memory, Memory)}
        dense = [p for p in self.model.parameters() if id(p) not in anchors]
        nn.utils.clip_grads_with_norm_(dense, self.recipe.clip or math.inf, norm)
        return float(norm)

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        rows = len(batch["input_ids"])
        size = self.recipe.micro_batch_size or rows
        moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
        return [{name: tensor[at : at + size] for name, tensor in moved.items()} for at in range(0, rows, size)]

    def _draw_boundaries(self, parts: list[Batch]) -> torch.Tensor:
        """Give each part its boundaries; how many there are in the step, and of how many tokens, over the processes."""
        counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        for part in parts:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
                part["boundaries"], own = self.model.choose_boundaries(
                    **{name: tensor for name, tensor in part.items() if name != "labels"}
                )
            counts += own
        if self.world > 1:
            dist.all_reduce(counts)
        return counts / self.world

    def _no_exchange(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.parallel, DistributedDataParallel):
            return self.parallel.no_sync()
        return contextlib.nullcontext()

    def _overdue(self) -> bool:
        return 0 < self.recipe.max_seconds < self.seconds - self._before

    def _log(self, loss: float, mtp_loss: float, concepts: float, rate: float, norm: float, took: float) -> None:
        if self.rank:
            return
        record: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
        record |= {"loss": loss, "lr": rate, "grad_norm": norm}
        if self.predicts:
            record["mtp_loss"] = mtp_loss
        packer = self.loader.packer
        if concepts:
            record["tokens_per_concept"] = round(packer.batch_size * packer.length / concepts, 4)
        record["tokens_per_second"] = round(packer.batch_size * packer.length / took, 1)
        for name in ("rows_touched", "max_violation"):
            if hasattr(self.optimizer, name):
                record[name] = getattr(self.optimizer, name)
        if self.recipe.placement == "file" and getattr(self.model, "memory_stack", None) is not None:
            read, waited = self.model.memory_stack.read_times()
            record |= {"read_seconds": round(read, 3), "reads_hidden": round(1 - waited / read, 3) if read else 0.0}
        if self.metrics and (_due(self.step, self.recipe.log_every) or self.step == 1):
            self.metrics.write(**record)
        self.report(record)

    def _evaluate_on_the_way(self) -> None:
        if _due(self.step, self.recipe.eval_every) and self.evaluated < self.step < self.recipe.steps:
            self.evaluated = self.step
            self._evaluate(self.recipe.eval_batches, self.evaluating)

    def _last_evaluation(self, done: int, total: int) -> None:
        self.evaluating(done, total)
        if self.signals.noted and self.world == 1:  # others would wait for this process
            assert self.saved is not None
            raise Interrupted(self.signals.noted, self.step, self.saved)

    def _evaluate(self, batches: int, report: Callable[[int, int], None]) -> Score:
        score = evaluate(self.model, self.validation, self.recipe.precision, batches, report)
        if self.metrics:
            record: dict[str, Any] = {"step": self.step, "tokens": self.tokens}
            record |= {"seconds": round(self.seconds, 3), "val_loss": score.loss}
            record["bits_per_byte"] = score.bits_per_byte
            if score.tokens_per_concept:
                record["val_tokens_per_concept"] = round(score.tokens_per_concept, 4)
            self.metrics.write(**record)
            self.report(record)
        return score


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
