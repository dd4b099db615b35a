"""The demo: a DeepSeek-style mixture of experts against the same model with a memory, on the same tokens.

Both recipes name the same data and the same training; the sizes are equal (total parameters within 1 %,
active ones and FLOPs within 2 %), and that is printed and asserted before anything is trained. OUT/ holds
a run folder for each, and

    report.json  loss.png  sample.txt  gates.html  gates.json

Run again, it goes on: what is trained is not trained again, and nothing that lies there is removed.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from byrote.data.packing import Tokens
from byrote.data.tokenizer import load_tokenizer
from byrote.lab.inspect.gates import record, to_html, to_terminal
from byrote.models.counts import Counts, count
from byrote.tables.files.headers import parse_object
from byrote.train.checkpoint import latest
from byrote.train.folder import check_same
from byrote.train.metrics import plot_losses, read_metrics
from byrote.train.progress import DataLive
from byrote.train.recipe import RECIPES, Recipe
from byrote.train.run import config_of, data_folder, prepare_data, train

PAIR = {"moe": "tiny-moe.toml", "engram": "tiny-engram.toml"}
TOTAL, ACTIVE = 0.01, 0.02  # how far the two may differ
NAMES = {"total": "total parameters", "active": "active parameters", "flops_per_token": "FLOPs per token"}


def run_demo(out: Path, overrides: Iterable[str], console: Console) -> dict[str, dict[str, Any]]:
    """Train both, write everything to `out`, and return what report.json holds."""
    overrides = list(overrides)
    recipes = {name: Recipe.load(RECIPES / file, overrides) for name, file in PAIR.items()}
    for name, recipe in recipes.items():
        check_folder(recipe, out / name)
    counts = compare_counts(recipes, console)
    report: dict[str, dict[str, Any]] = {}
    for name, recipe in recipes.items():
        result = trained(recipe, out / name, console)
        report[name] = {
            "val_loss": result["val_loss"],
            "bits_per_byte": result["bits_per_byte"],
            "params_total": counts[name].total,
            "params_active": counts[name].active,
            "params_table": counts[name].table,
            "flops_per_token": counts[name].flops_per_token,
            "tokens": result["tokens"],
            "seconds": result["seconds"],
            "tokens_per_second": round(result["tokens"] / max(result["seconds"], 0.01), 1),
        }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    curves = {name: read_metrics(out / name / "metrics.jsonl") for name in recipes}
    plot_losses(curves, out / "loss.png", f"The same {report['moe']['tokens']:,} tokens of {recipe.data.corpus}")
    shutil.copy(out / "engram/sample.txt", out / "sample.txt")
    text = (out / "sample.txt").read_text().strip()
    checkpoint = latest(out / "engram")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    trace = record(model, load_tokenizer(checkpoint), text)
    trace.save(out / "gates.json")
    (out / "gates.html").write_text(to_html(trace, "A sample of the demo's model"), encoding="utf-8")
    console.print(table(report))
    console.print("\na sample of engram", style="bold")
    console.print(text)
    console.print("\nhow far its memories' gates open", style="bold")
    console.print(to_terminal(trace))
    files = "report.json, loss.png, sample.txt, gates.html, and a run folder for each"
    console.print(f"\n{out}: {files}", markup=False, soft_wrap=True)
    return report


def check_folder(recipe: Recipe, run: Path) -> None:
    """ValueError unless `run` is empty, or a run of this recipe that is done or can go on."""
    if (run / "recipe.json").exists():
        check_same(recipe, run)
    elif run.exists() and {path.name for path in run.iterdir()} - {
        "lock",
        "tokenizer",
    }:  # of a run that was killed early
        raise ValueError(f"{run} is not empty, and no run: choose another --out")


def trained(recipe: Recipe, run: Path, console: Console) -> dict[str, Any]:
    """The result.json of a run, which is trained, or gone on with, where it is not done."""
    if (run / "result.json").exists():
        check_text(recipe, run)
    else:
        train(recipe, run, console, resume=(run / "recipe.json").exists())
    return parse_object((run / "result.json").read_bytes(), str(run / "result.json"))


def check_text(recipe: Recipe, run: Path) -> None:
    """ValueError where a run that is done has read another text than its corpus holds now."""
    now = Tokens.open(data_folder(recipe), "train").fingerprint
    loader = torch.load(latest(run) / "training.pt", map_location="cpu", weights_only=True)["loader"]
    if loader.get("corpus", now) != now:
        raise ValueError(f"{run} was trained on another text than {recipe.data.corpus} is now: choose another --out")


def compare_counts(recipes: dict[str, Recipe], console: Console) -> dict[str, Counts]:
    """Count both models; ValueError unless they are the same size and see the same tokens."""
    first, second = recipes.values()
    if (first.data, first.train) != (second.data, second.train):
        raise ValueError("the two recipes differ in [data] or [train]; the comparison needs the same tokens")
    with DataLive(console, first.data.corpus) as live:
        data, _ = prepare_data(first, live.report)
    tokenizer = load_tokenizer(data / "tokenizer")
    counts = {name: count(config_of(recipe, tokenizer), recipe.data.length) for name, recipe in recipes.items()}
    check_sizes(counts)
    for name, c in counts.items():
        sizes = f"{c.total:,} parameters ({c.table:,} in tables), {c.active:,} active"
        console.print(f"{name}: {sizes}, {c.flops_per_token:,} FLOPs a token")
    return counts


def check_sizes(counts: dict[str, Counts]) -> None:
    names = list(counts)
    for field, share in (("total", TOTAL), ("active", ACTIVE), ("flops_per_token", ACTIVE)):
        a, b = (getattr(counts[name], field) for name in names)
        if abs(a - b) > share * a:
            raise ValueError(
                f"{NAMES[field]} differ by {abs(a - b) / a:.1%} ({names[0]} {a:,}, {names[1]} {b:,}); "
                f"at most {share:.0%} is a comparison: change the experts or the tables of a recipe"
            )


def table(report: dict[str, dict[str, Any]]) -> Table:
    """The comparison, a column a model."""
    rows = {
        "validation loss": ("val_loss", "{:.4f}"),
        "bits per byte": ("bits_per_byte", "{:.4f}"),
        "seconds of training": ("seconds", "{:.1f}"),
        "tokens": ("tokens", "{:,}"),
        "tokens per second": ("tokens_per_second", "{:,.0f}"),
        "training FLOPs per token": ("flops_per_token", "{:,}"),
        "parameters": ("params_total", "{:,}"),
        "of them active": ("params_active", "{:,}"),
        "of them in tables": ("params_table", "{:,}"),
    }
    shown = Table(title="one seed; docs/log.md has three, and two corpora")
    shown.add_column("")
    for name in report:
        shown.add_column(name, justify="right")
    for label, (key, form) in rows.items():
        shown.add_row(label, *(form.format(report[name][key]) for name in report))
    return shown
