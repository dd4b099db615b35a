"""`byrote info`: what a model or a run consists of."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from byrote.cli.output import terminal

# A parameter belongs to the first part whose mark is in its name.
PARTS = {
    "boundaries, pooling, reading of concepts": (".boundary.", ".up.", ".read.", ".beginning"),
    "connections of the streams, exit": ("_connection.", ".exit."),
    "embedding and head": ("embed_tokens", "lm_head"),
    "attention": (".attention.", ".self_attn."),
    "routed experts": (".experts.experts.",),
    "router": (".router.",),
    "shared experts and dense layers": (".experts.", ".mlp."),
    "memory: gates, projections, convolution": (".memory.",),
    "norms": ("norm",),
}


def info(
    folder: Annotated[Path, typer.Argument(help="A run folder or any Hugging Face model folder.")],
    config: Annotated[bool, typer.Option("--config", help="Print the whole config too.")] = False,
) -> None:
    """Show a model's parameters by part, its tables and addresses, and a run's checkpoints."""
    from byrote.cli.load import load_model, model_folder
    from byrote.models.configuration import MemoryConfig

    console = terminal()
    found = model_folder(folder)
    model = load_model(folder)
    console.print(f"{found}: {type(model).__name__}", soft_wrap=True)
    console.print(_parameters(model))
    if isinstance(model.config, MemoryConfig):
        _ours(console, model)
    if found != folder:
        _run(console, folder)
    if config:
        console.print_json(json.dumps(model.config.to_dict(), default=str))


def _parameters(model: Any) -> Table:
    sizes = dict.fromkeys([*PARTS, "other"], 0)
    further = 0
    for name, parameter in model.named_parameters():
        if ".mtp." in name:
            further += parameter.numel()
        elif not name.endswith(".anchor"):
            part = next((part for part, marks in PARTS.items() if any(mark in name for mark in marks)), "other")
            sizes[part] += parameter.numel()
    table = Table("parameters", box=None, pad_edge=False)
    table.add_column(justify="right")
    for part, size in sizes.items():
        if size:
            table.add_row(part, f"{size:,}")
    table.add_row("all but tables", f"{sum(sizes.values()):,}", style="bold")
    if further:
        table.add_row("apart: multi-token prediction", f"{further:,}")
    return table


def _ours(console: Console, model: Any) -> None:
    from byrote.models.counts import count

    memories = model.model.memories
    if memories is not None:
        table = Table("tables", "rows", "width", "bytes", "generation", box=None, pad_edge=False)
        for layer_id, memory in memories.items():
            stats = memory.table.stats()
            cells = (f"{stats[field]:,}" for field in ("num_rows", "width", "bytes", "generation"))
            table.add_row(f"layer {layer_id}", *cells)
        console.print(table)
        console.print(f"addresses: {memories.spec.contract}, digest {memories.spec.digest}", soft_wrap=True)
    counts = count(model.config)
    apart = f", in prediction modules, apart, {counts.prediction:,}" if counts.prediction else ""
    console.print(
        f"total {counts.total:,}, active per token {counts.active:,}, in tables {counts.table:,}{apart}; "
        f"training FLOPs per token {counts.flops_per_token:,}",
        highlight=False,
    )


def _run(console: Console, run: Path) -> None:
    from byrote.tables.files.headers import parse_object
    from byrote.train.checkpoint import checkpoints

    console.print("checkpoints: " + ", ".join(path.name for path in checkpoints(run)))
    if (run / "result.json").exists():
        result = parse_object((run / "result.json").read_bytes(), str(run / "result.json"))
        console.print("result: " + ", ".join(f"{key} {value}" for key, value in result.items()))
