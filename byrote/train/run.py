"""A recipe, made to run: data, tokenizer, model, optimizer, trainer; and the run folder it leaves.

    RUN/recipe.json  tokenizer/  checkpoints/  metrics.jsonl  loss.png  sample.txt  result.json

Under torchrun each process runs this; they share the rows of a batch, and rank 0 writes.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from byrote.address import compress
from byrote.data.loader import Loader
from byrote.data.packing import Batch, Packer, Tokens
from byrote.data.prepare import default_folder, prepare
from byrote.data.tokenizer import load_tokenizer
from byrote.models.families import CausalLM, Config, config_class, model_class
from byrote.tables.placements.device import accelerator
from byrote.tables.placements.open import PLACEMENTS
from byrote.tables.placements.pinned import check_gpu
from byrote.train import file_tables as filetables
from byrote.train.allocator import keep_freed_memory
from byrote.train.checkpoint import FOLDERS, align, latest, sharded
from byrote.train.evaluate import Validation
from byrote.train.metrics import plot_losses, read_metrics
from byrote.train.muon import Muon
from byrote.train.optimizer import Optimizer
from byrote.train.progress import DataLive, Live
from byrote.train.recipe import Recipe
from byrote.train.trainer import Result, Trainer

# What may differ between a run and its resumption: nothing that the weights depend on.
FREE = {"checkpoint_every", "keep", "log_every", "max_seconds", "read_ahead", "prompt", "sample_tokens"}


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


def train(recipe: Recipe, run: Path, console: Console, resume: bool = False) -> tuple[Trainer, Result]:
    """Do the whole of it, with live progress on rank 0's console."""
    keep_freed_memory()
    console = console if rank() == 0 else Console(quiet=True)
    _check_processes(recipe)
    with DataLive(console, recipe.data.corpus) as live:
        data, meta = prepare_data(recipe, live.report)
    with Live(console, run.name, recipe.train.steps) as shown:
        trainer = make_trainer(recipe, run, data, meta, resume, shown.report)
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
) -> Trainer:
    """The trainer of a new run in `run`, or of the one that stopped there."""
    settings = recipe.train
    _check_processes(recipe)
    checkpoint = _resumed(recipe, run) if resume else None
    if settings.threads:
        torch.set_num_threads(settings.threads)
    tokenizer = load_tokenizer(data / "tokenizer")
    config = config_of(recipe, tokenizer)
    if checkpoint:
        in_file = PLACEMENTS[settings.placement].in_file
        model = model_class(config).from_pretrained(checkpoint, placement="file" if in_file else "host")
        align(model)
    else:
        torch.manual_seed(settings.seed)
        model = model_class(config)(config, compress(tokenizer))
        torch.manual_seed(settings.seed + rank())  # each process draws boundaries of its own
        if rank() == 0:
            _begin(recipe, run, tokenizer)
        _wait()
    device = _device(settings.device)
    model.to(device)
    if getattr(model, "memory_stack", None) is not None:
        model.memory_stack.move(settings.placement, device)
    world = dist.get_world_size() if dist.is_initialized() else 1
    packer = Packer(Tokens.open(data, "train"), settings.batch_size, recipe.data.length, settings.seed, rank(), world)
    validation = Validation(
        Tokens.open(data, "validation"),
        meta["validation"]["bytes"],
        settings.micro_batch_size or settings.batch_size,
        recipe.data.length,
    )
    stack = getattr(model, "memory_stack", None)

    def warm(batch: Batch) -> None:
        if stack is not None:
            stack.warm(batch["input_ids"], batch["position_ids"])

    loader = Loader(packer, settings.read_ahead, warm)
    optimizer = build_optimizer(recipe, model)
    if settings.placement == "file":
        if checkpoint:
            filetables.resume(model, run, FOLDERS)
        else:
            filetables.begin(model, run, optimizer, FOLDERS)
    return Trainer(settings, model, optimizer, loader, validation, run, tokenizer, checkpoint, report)


def finish(recipe: Recipe, trainer: Trainer, result: Result, data: Path) -> None:
    """The picture, the sample and the numbers of a run that is done."""
    text = sample(recipe, trainer, data) if rank() == 0 or sharded(trainer.model) else ""  # all ranks read the tables
    if rank():
        return
    name, records = trainer.run.name, read_metrics(trainer.run / "metrics.jsonl")
    plot_losses({name: records}, trainer.run / "loss.png", f"{name} on {recipe.data.corpus}")
    (trainer.run / "sample.txt").write_text(text + "\n")
    content = {"val_loss": result.score.loss, "bits_per_byte": result.score.bits_per_byte}
    content |= {"tokens": result.tokens, "seconds": round(result.seconds, 2)}
    (trainer.run / "result.json").write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def sample(recipe: Recipe, trainer: Trainer, data: Path) -> str:
    """A continuation of the recipe's prompt, or of how the first validation document begins."""
    prompt, tokens = recipe.train.prompt, trainer.validation.data
    if prompt:
        ids = trainer.tokenizer(prompt, return_tensors="pt", split_special_tokens=True).input_ids
    else:
        ids = torch.from_numpy(tokens.tokens[: min(12, int(tokens.offsets[1]) - 1)].astype("int64"))[None]
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


def _device(name: str) -> torch.device:
    """`auto`: the GPU of this process, if there is one."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


def _check_processes(recipe: Recipe) -> None:
    if recipe.train.placement == "sharded" and not dist.is_initialized():
        raise ValueError(
            'train.placement is "sharded", which needs processes to share the rows: start with '
            'torchrun --nproc-per-node=2 -m byrote train RECIPE, or use "host"'
        )
    if recipe.train.placement == "device" and recipe.train.device == "auto":
        accelerator()  # with train.device = "cpu" the tables are in RAM, as the model is
    if recipe.train.placement == "pinned":
        check_gpu()


def _begin(recipe: Recipe, run: Path, tokenizer: Any) -> None:
    if (run / "recipe.json").exists():
        raise ValueError(f"{run} holds a run already; resume it with --resume, or choose another --out")
    run.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(run / "tokenizer")
    recipe.save(run / "recipe.json")


def _resumed(recipe: Recipe, run: Path) -> Path:
    before = Recipe.load(run / "recipe.json").to_dict() if (run / "recipe.json").exists() else None
    if before is None:
        raise ValueError(f"{run} holds no run to resume; start one without --resume")
    after = recipe.to_dict()
    for section in before:
        for key in before[section].keys() | after[section].keys():
            old, new = before[section].get(key), after[section].get(key)
            if old != new and not (section == "train" and key in FREE):
                raise ValueError(f"{section}.{key} was {old!r} when the run began and is {new!r}; resume with the same")
    return latest(run)
