"""`byrote table stats`: how many rows a cache must hold."""

from pathlib import Path
from typing import Annotated

import typer

from byrote.cli.output import progress, terminal


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
    from byrote.lab.studies.cache_curves import cache_curves, save_curves
    from byrote.train.progress import DataLive
    from byrote.train.recipe import Recipe
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
