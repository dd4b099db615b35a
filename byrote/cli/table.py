"""`byrote table`: look at tables and measure them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from byrote.cli.output import progress, terminal, write
from byrote.cli.table_convert import convert
from byrote.cli.table_info import info
from byrote.cli.table_verify import verify

table = typer.Typer(no_args_is_help=True, help="Tables: what is in them, how they are read.")


@table.callback()
def _table() -> None:
    """Tables: what is in them, how they are read."""


for _verb in (info, verify, convert):
    table.command()(_verb)


@table.command()
def stats(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe (.toml) with a memory: its corpus, tokenizer and addresses.")
    ],
    sets: Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for hit_rates.png and hit_rates.json.")] = Path("runs/table-stats"),
    tokens: Annotated[int, typer.Option(help="How many tokens of the training text at most.")] = 1_000_000,
    batch: Annotated[int, typer.Option(help="Tokens that are read together.")] = 64,
) -> None:
    """Draw the hit rates of a cache, per n-gram order, on the text of a recipe.

    \b
    byrote table stats recipes/tiny-engram.toml \\
        --set "model.memory_table_sizes=[1000000, 1000000]"
    """
    from rich.table import Table

    from byrote.address import compress
    from byrote.data.packing import Tokens
    from byrote.data.tokenizer import load_tokenizer
    from byrote.lab.cache_curves import cache_curves, save_curves
    from byrote.train.config import Recipe
    from byrote.train.progress import DataLive
    from byrote.train.run import config_of, prepare_data

    console = terminal()
    chosen = Recipe.load(recipe, sets or [])
    with DataLive(console, chosen.data.corpus) as live:
        data, _ = prepare_data(chosen, live.report)
    tokenizer = load_tokenizer(data / "tokenizer")
    spec = config_of(chosen, tokenizer).spec
    if spec is None:
        raise ValueError(f"{recipe} describes a model without a memory; give one with model.memory_layers")
    layer = spec.layers[0]
    with progress(console) as bar:
        task = bar.add_task(f"layer {layer.layer_id}", total=None)
        curves = cache_curves(
            spec,
            layer,
            compress(tokenizer),
            Tokens.open(data, "train"),
            batch=batch,
            most=tokens,
            report=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for curve in curves:
        shown = Table("rows cached", "hits", "best fixed set")
        for row in zip(curve.sizes, curve.hits, curve.best, strict=True):
            shown.add_row(f"{row[0]:,}", f"{row[1]:.1%}", f"{row[2]:.1%}")
        console.print(
            f"\n{curve.order}-grams: {curve.distinct:,} rows read, {curve.reads:,} reads counted", style="bold"
        )
        console.print(shown)
    save_curves(curves, out, f"{chosen.data.corpus}, layer {layer.layer_id}, {batch} tokens at a time")
    console.print(f"{out}/hit_rates.png, hit_rates.json", soft_wrap=True)


@table.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Small tables: seconds, not minutes.")] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="Read files of 10 GB too, and decode with them (quick: 0.3 GB); made here, then deleted."),
    ] = None,
    fbgemm: Annotated[
        Path | None, typer.Option(help="A Python interpreter that has FBGEMM (fbgemm-gpu-cpu), to compare with.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here too.")] = None,
) -> None:
    """Measure tables against what else there is, on one core."""
    import platform

    import torch
    from rich.table import Table

    from byrote.lab.file_bench import engramdb_is_there
    from byrote.lab.ratios import Options
    from byrote.lab.table_bench import run
    from byrote.lab.update_bench import state_bytes
    from byrote.train.allocator import keep_freed_memory

    keep_freed_memory()  # as in training: pages that each round has to ask for again are noise, ours and theirs
    console = terminal()
    shown = Table(box=None, pad_edge=False)
    for column in ("what", "ms", "theirs", "ratio", "range", "goal", ""):
        shown.add_column(column, justify="left" if column in ("what", "") else "right", no_wrap=column != "what")
    rows = []
    with console.status("measuring"):
        for row in run(Options(quick, folder=folder, fbgemm=fbgemm)):
            rows.append(row)
            goal = "" if row.target is None else f"{row.target:g}"
            goal = goal if row.limit is None else f"at most {row.limit:g}"
            verdict = {None: "", True: "met", False: "not met"}[row.met]
            spread = f"{min(row.ratios):.2f}-{max(row.ratios):.2f}"
            numbers = (f"{row.ours_ms:.2f}", f"{row.theirs_ms:.2f}", f"{row.ratio:.2f}", spread, goal, verdict)
            shown.add_row(f"{row.what}; against {row.against}", *numbers)
    sizes = state_bytes()
    console.print(shown)
    console.print(
        "ratio: their time over ours (with a goal of at most: ours over theirs); median of the rounds, and range"
    )
    if fbgemm is None:
        console.print(
            "FBGEMM: not measured, give --fbgemm PYTHON of an environment with fbgemm-gpu-cpu==1.8.0, torch==2.13.0"
        )
    if folder is None:
        console.print("rows out of a file: not measured, give a --folder with 12 GB of space")
    elif not engramdb_is_there():
        console.print("engramdb-python: not installed, so there are no rows against it")
    memory = None
    if folder is not None:
        from byrote.lab.decode_bench import decode_memory, memory_line

        memory = decode_memory(Options(quick, folder=folder))
        console.print(memory_line(memory))
    for size in sizes:
        what = f"state of {size['rule']}, rows of {size['width']}: {size['bytes']:.3f} bytes for each {size['of each']}"
        console.print(f"{what}, {size['resident']:.3f} in memory ({size['target']})")
    if json_file:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
        content = {
            "machine": machine,
            "quick": quick,
            "rows": [row.to_dict() for row in rows],
            "state": sizes,
            "decode": memory,
        }
        write(json_file, json.dumps(content, indent=2) + "\n")
