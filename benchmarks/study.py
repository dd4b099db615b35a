"""Does the memory help at equal parameters? Seeds x corpora x models, with two controls; the numbers in docs/log.md.

    python benchmarks/study.py --out runs/study --jobs 2

moe      recipes/tiny-moe.toml            the backbone alone
engram   recipes/tiny-engram.toml         a quarter of the expert parameters in tables
bigram   recipes/controls/bigram.toml     as many rows, addressed by bigrams, added to the residual without a gate
one-row  recipes/tiny-engram.toml         the same tables, but every n-gram addresses the first row of its column

Total parameters are equal within 1 %, active ones within 2 %. A run that is done is not run again. Each run uses one
thread; `--jobs` of them run side by side, so seconds compare only within one invocation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from byrote.models.engram.counts import count
from byrote.train.config import Recipe
from byrote.train.run import make_trainer, prepare_data

RECIPES = Path(__file__).parents[1] / "recipes"
MODELS = {
    "moe": RECIPES / "tiny-moe.toml",
    "engram": RECIPES / "tiny-engram.toml",
    "bigram": RECIPES / "controls" / "bigram.toml",
    "one-row": RECIPES / "tiny-engram.toml",
}
CORPORA = ("factbook", "prose")
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, two-sided 95 %, by number of seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--corpora", nargs="+", default=list(CORPORA))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every recipe")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "CORPUS", "SEED"), help="one run, in this process")
    args = parser.parse_args()
    if args.one:
        run_one(args.out, *args.one[:2], int(args.one[2]), args.set)
        return
    for corpus in args.corpora:
        prepare_data(recipe(args.models[0], corpus, 0, args.set), lambda what, done, total: None)
    grid = [(m, c, s) for c in args.corpora for s in range(args.seeds) for m in args.models]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda cell: start(args.out, *cell, args.set), grid))
    for corpus in args.corpora:
        print(table(args.out, corpus, args.models, args.seeds))


def folder(out: Path, model: str, corpus: str, seed: int) -> Path:
    return out / corpus / f"{model}-{seed}"


def recipe(model: str, corpus: str, seed: int, overrides: list[str]) -> Recipe:
    seeds = [f"train.seed={seed}", f"model.memory_seed={seed}"]  # of weights and data; of the hash and the rows
    common = [f'data.corpus="{corpus}"', *seeds, "train.threads=1", "train.eval_every=0"]
    return Recipe.load(MODELS[model], [*common, *overrides])


def start(out: Path, model: str, corpus: str, seed: int, overrides: list[str]) -> None:
    """One run in a process of its own, unless it is done."""
    result = folder(out, model, corpus, seed) / "study.json"
    if not result.exists():
        command = [sys.executable, __file__, "--out", str(out), "--one", model, corpus, str(seed), "--set", *overrides]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    print(f"{corpus} {model} seed {seed}: {json.loads(result.read_text())}", flush=True)


def run_one(out: Path, model: str, corpus: str, seed: int, overrides: list[str]) -> None:
    settings = recipe(model, corpus, seed, overrides)
    run = folder(out, model, corpus, seed)
    shutil.rmtree(run, ignore_errors=True)
    data, meta = prepare_data(settings, lambda what, done, total: None)
    trainer = make_trainer(settings, run, data, meta)
    if model == "one-row":
        trainer.model.model.memories.register_forward_hook(address_one_row)
    result = trainer.train()
    counts = count(trainer.model.config, settings.data.length)
    content = {
        "val_loss": result.score.loss,
        "bits_per_byte": result.score.bits_per_byte,
        "seconds": round(result.seconds, 1),
        "tokens": result.tokens,
        "params_total": counts.total,
        "params_active": counts.active,
    }
    (run / "study.json").write_text(json.dumps(content))
    shutil.rmtree(run / "checkpoints")


def address_one_row(stack, inputs, tickets):
    """Every n-gram reads the first row of its column: what is left of a memory that does not look anything up."""
    replaced = {}
    for layer_id, ticket in tickets.items():
        first = torch.tensor(stack.spec.layer(layer_id).offsets, device=ticket.rows.device)
        replaced[layer_id] = dataclasses.replace(ticket, rows=first.expand_as(ticket.rows).contiguous())
    return replaced


def table(out: Path, corpus: str, models: list[str], seeds: int) -> str:
    """Means over seeds with their standard deviation, and the paired difference from moe with its 95 % interval."""
    results = {
        m: [json.loads((folder(out, m, corpus, s) / "study.json").read_text()) for s in range(seeds)] for m in models
    }
    lines = [
        f"\n{corpus}, {seeds} seeds, {results[models[0]][0]['tokens']:,} tokens\n",
        "| model | validation loss | bits per byte | loss minus moe | seconds | parameters | active |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, runs in results.items():
        losses = [run["val_loss"] for run in runs]
        difference = ""
        if model != "moe" and "moe" in results:
            pairs = [mine - base["val_loss"] for mine, base in zip(losses, results["moe"], strict=True)]
            half = T95[seeds] * statistics.stdev(pairs) / math.sqrt(seeds) if seeds in T95 else float("nan")
            difference = f"{statistics.mean(pairs):+.4f} ± {half:.4f}"
        bits = statistics.mean(run["bits_per_byte"] for run in runs)
        seconds = statistics.mean(run["seconds"] for run in runs)
        spread = statistics.stdev(losses) if seeds > 1 else float("nan")
        lines.append(
            f"| {model} | {statistics.mean(losses):.4f} (sd {spread:.4f}) | {bits:.4f} | {difference} | {seconds:.0f} "
            f"| {runs[0]['params_total']:,} | {runs[0]['params_active']:,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
