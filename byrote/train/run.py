"""A recipe, made to run: data, tokenizer, model, optimizer, trainer; and the run folder it leaves.

What a run folder holds: byrote.train.folder. Under torchrun each process runs this; they share the rows of a batch, and
rank 0 writes.
"""

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from byrote.address import compress
from byrote.data.loader import Loader
from byrote.data.packing import Batch, Packer, Tokens
from byrote.data.prepare import default_folder, prepare
from byrote.data.tokenizer import encode_prompt, load_tokenizer
from byrote.models.families import CausalLM, Config, config_class, model_class
from byrote.tables.log.disk import naming
from byrote.tables.placements.device import accelerator
from byrote.tables.placements.open import PLACEMENTS
from byrote.tables.placements.pinned import check_gpu
from byrote.train import file_tables, folder
from byrote.train.allocator import keep_freed_memory
from byrote.train.checkpoint import FOLDERS, corpus_of, sharded
from byrote.train.evaluate import Score, Validation, evaluate
from byrote.train.metrics import plot_losses, read_metrics
from byrote.train.muon import Muon
from byrote.train.optimizer import Optimizer
from byrote.train.progress import DataLive, Live
from byrote.train.recipe import Recipe
from byrote.train.trainer import Result, Trainer


def config_of(recipe: Recipe, tokenizer: Any) -> Config:
    """The model's config: the preset, the recipe's overrides, and what follows from the tokenizer."""
    pad, bos, eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    specials = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad, "memory_pad_token_id": pad}
    return config_class(recipe.model.preset).from_preset(
        recipe.model.preset, vocabulary=compress(tokenizer), **{**specials, **recipe.model.overrides}
    )


def build_optimizer(recipe: Recipe, model: CausalLM) -> Optimizer:
    settings = recipe.train
    return Optimizer(
        model,
        settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        row_rate=settings.row_rate,
        row_rule=settings.row_rule,
        muon=Muon(coefficients=settings.muon_coefficients) if settings.optimizer == "muon" else None,  # type: ignore[arg-type]
        muon_rate=settings.muon_rate,
    )


def data_folder(recipe: Recipe) -> Path:
    return Path(recipe.data.folder) if recipe.data.folder else default_folder(recipe.data.corpus)


def prepare_data(recipe: Recipe, report: Callable[[str, int, int], None]) -> tuple[Path, dict[str, Any]]:
    folder = data_folder(recipe)
    if rank() == 0:
        meta = prepare(recipe.data.options, folder, report)
    _wait()
    return folder, meta if rank() == 0 else prepare(recipe.data.options, folder)


def train(
    recipe: Recipe, run: Path, console: Console, resume: bool = False, checkpoint: str = ""
) -> tuple[Trainer, Result]:
    """Do the whole of it, with live progress on rank 0's console."""
    keep_freed_memory()
    console = console if rank() == 0 else Console(quiet=True)
    _check_machine(recipe)
    if resume:  # or an error, before the data is prepared
        folder.check_resumable(recipe, run, checkpoint)
    else:
        folder.check_new(run)
    with DataLive(console, recipe.data.corpus) as live:
        data, meta = prepare_data(recipe, live.report)
    with Live(console, run.name, recipe.train.steps) as shown:
        trainer = make_trainer(recipe, run, data, meta, resume, shown.report, shown.evaluating, checkpoint)
        result = trainer.train()
    finish(recipe, trainer, result, data)
    return trainer, result


def make_trainer(
    recipe: Recipe,
    run: Path,
    data: Path,
    meta: dict[str, Any],
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda record: None,
    evaluating: Callable[[int, int], None] = lambda done, total: None,
    checkpoint: str = "",
) -> Trainer:
    """The trainer of a new run in `run`; or, with `resume`, of the one that stopped there, behind its latest checkpoint
    or the one that is named, or from its start where it has none. It alone writes there until it has trained.
    """
    settings = recipe.train
    _check_machine(recipe)
    for part in ("train", "validation"):
        Tokens.open(data, part)  # or an error, before the run begins
    with contextlib.ExitStack() as held:
        if rank() == 0:
            held.enter_context(folder.locked(run, begins=not resume))
            if not resume:
                folder.check_new(run)
        found = folder.check_resumable(recipe, run, checkpoint) if resume else None
        if settings.threads:
            torch.set_num_threads(settings.threads)
        tokenizer = load_tokenizer(data / "tokenizer")
        if found:
            model = _open(recipe, found, tokenizer)
        else:
            model = _draw(recipe, tokenizer)
            if rank() == 0:
                folder.begin(recipe, run, tokenizer)
            _wait()
        _place(model, recipe)
        optimizer = build_optimizer(recipe, model)
        if settings.placement == "file":
            if found:
                file_tables.resume(model, run, FOLDERS)
            else:
                file_tables.begin(model, run, optimizer, FOLDERS)
        loader, validation = _loader(recipe, data, model), validation_of(recipe, data, meta)
        trainer = Trainer(settings, model, optimizer, loader, validation, run, tokenizer, found, report, evaluating)
        if found and rank() == 0:
            folder.go_on(recipe, run, found)
        trainer.held = held.pop_all()
        return trainer


def evaluate_checkpoint(
    recipe: Recipe,
    checkpoint: Path,
    console: Console,
    device: str = "auto",
    change: Callable[[Any], None] = lambda model: None,
) -> Score:
    """The score of a run's checkpoint on all of the run's validation text; `change` is done to the model first."""
    placement = "file" if PLACEMENTS[recipe.train.placement].in_file else "host"
    recipe = replace(recipe, train=replace(recipe.train, placement=placement, device=device))
    _check_machine(recipe)
    with DataLive(console, recipe.data.corpus) as live:
        data, meta = prepare_data(recipe, live.report)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer.get_vocab() != load_tokenizer(data / "tokenizer").get_vocab():
        raise ValueError(f"{data} was prepared with another tokenizer than that of {checkpoint}: prepare it again")
    trained_on = corpus_of(checkpoint)
    if trained_on and trained_on != Tokens.open(data, "train").fingerprint:  # which reads all of them
        console.print(f"{data} is not the text that the run was trained on: do not compare with its losses")
    model = _open(recipe, checkpoint, tokenizer)
    _place(model, recipe)
    change(model)
    with Live(console, checkpoint.name) as shown:
        return evaluate(model, validation_of(recipe, data, meta), recipe.train.precision, report=shown.evaluating)


def _draw(recipe: Recipe, tokenizer: Any) -> Any:
    """A new model."""
    config = config_of(recipe, tokenizer)
    torch.manual_seed(recipe.train.seed)
    model = model_class(config)(config, compress(tokenizer))
    torch.manual_seed(recipe.train.seed + rank())  # each process draws boundaries of its own
    return model


def _open(recipe: Recipe, checkpoint: Path, tokenizer: Any) -> Any:
    """The model of a checkpoint, its tables where they are read before they are moved."""
    opened = "file" if PLACEMENTS[recipe.train.placement].in_file else "host"
    model = model_class(config_of(recipe, tokenizer)).from_pretrained(checkpoint, placement=opened)
    return model


def _place(model: Any, recipe: Recipe) -> None:
    """Move the model, and its tables, to where the recipe wants them."""
    stack, device = getattr(model, "memory_stack", None), open_device(recipe.train.device, "train.device")
    model.to(device)
    if stack is not None:
        stack.move(recipe.train.placement, device)


def _loader(recipe: Recipe, data: Path, model: Any) -> Loader:
    """Batches of this process, whose rows of tables are being read as soon as they are packed."""
    settings, stack = recipe.train, getattr(model, "memory_stack", None)
    world = dist.get_world_size() if dist.is_initialized() else 1
    tokens = Tokens.open(data, "train")
    packer = Packer(tokens, settings.batch_size, recipe.data.length, settings.seed, rank(), world)

    def warm(batch: Batch) -> None:
        if stack is not None:
            stack.warm(batch["input_ids"], batch["position_ids"])

    return Loader(packer, settings.read_ahead, warm)


def validation_of(recipe: Recipe, data: Path, meta: dict[str, Any]) -> Validation:
    """The validation text of a corpus that `prepare_data` gave, in the batches of training."""
    return Validation(
        Tokens.open(data, "validation"),
        meta["validation"]["bytes"],
        recipe.train.micro_batch_size or recipe.train.batch_size,
        recipe.data.length,
    )


def finish(recipe: Recipe, trainer: Trainer, result: Result, data: Path) -> None:
    """The picture, the sample and the numbers of a run that is done."""
    text = sample(recipe, trainer, data) if rank() == 0 or sharded(trainer.model) else ""  # all ranks read the tables
    if rank():
        return
    name, records = trainer.run.name, read_metrics(trainer.run / "metrics.jsonl")
    plot_losses({name: records}, trainer.run / "loss.png", f"{name} on {recipe.data.corpus}")
    with naming(trainer.run):
        (trainer.run / "sample.txt").write_text(text + "\n", "utf-8")
    content = {"val_loss": result.score.loss, "bits_per_byte": result.score.bits_per_byte}
    content |= {"tokens": result.tokens, "seconds": round(result.seconds, 2)}
    folder.replace_text(trainer.run / "result.json", json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def sample(recipe: Recipe, trainer: Trainer, data: Path) -> str:
    """A continuation of the recipe's prompt, or of how the first validation document begins."""
    prompt, tokens = recipe.train.prompt, trainer.validation.data
    if prompt:
        ids = torch.tensor([encode_prompt(trainer.tokenizer, prompt)])
    else:
        ids = torch.from_numpy(tokens.tokens[: max(1, min(12, int(tokens.offsets[1]) - 1))].astype("int64"))[None]
    if not recipe.train.sample_tokens:
        return trainer.tokenizer.decode(ids[0], skip_special_tokens=True)
    trainer.model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.train.seed)
        generated = trainer.model.generate(
            ids.to(trainer.device),
            attention_mask=torch.ones_like(ids, device=trainer.device),
            max_new_tokens=recipe.train.sample_tokens,
            do_sample=True,
            temperature=0.8,
        )
    return trainer.tokenizer.decode(generated[0], skip_special_tokens=True)


def start_processes() -> None:
    """Join the process group where torchrun started us."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 or dist.is_torchelastic_launched()
    if started and not dist.is_initialized():
        dist.init_process_group("gloo")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def open_device(name: str, field: str) -> torch.device:
    """`auto`: the GPU of this process, if there is one. ValueError where torch cannot compute on it."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f'{field} is {name!r}, on which torch cannot compute here ({why}): give "cpu"') from None
    return torch.device(name)


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _check_machine(recipe: Recipe) -> None:
    """ValueError where this machine, or this way to start, lacks what the recipe asks for."""
    open_device(recipe.train.device, "train.device")
    if recipe.train.placement == "sharded" and not dist.is_initialized():
        raise ValueError(
            'train.placement is "sharded", which needs processes to share the rows: start with '
            'torchrun --nproc-per-node=2 -m byrote train RECIPE, or use "host"'
        )
    if recipe.train.placement == "device" and recipe.train.device == "auto":
        accelerator()  # with train.device = "cpu" the tables are in RAM, as the model is
    if recipe.train.placement == "pinned":
        check_gpu()
