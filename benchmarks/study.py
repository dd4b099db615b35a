"""Does the memory help at equal parameters? Seeds x corpora x models, with two controls; the numbers in docs/log.md.

    python benchmarks/study.py --out runs/study --jobs 2

moe      recipes/tiny-moe.toml            the backbone alone
engram   recipes/tiny-engram.toml         a quarter of the expert parameters in tables
bigram   recipes/controls/bigram.toml     as many rows, addressed by bigrams, added to the residual without a gate
one-row  recipes/tiny-engram.toml         the same tables, but every n-gram addresses the first row of its column

Total parameters are equal within 1 %, active ones within 2 %. A run that is done is not run again, and one that was
stopped goes on (byrote/lab/studies/runner.py). Each run uses one thread; `--jobs` of them run side by side, so seconds
compare only within one invocation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from byrote.lab.studies.plan import plan
from byrote.lab.studies.report import markdown, rows
from byrote.lab.studies.runner import run_lab
from byrote.train.recipe import RECIPES

MODELS = {
    "moe": f"{RECIPES}/tiny-moe.toml",
    "engram": f"{RECIPES}/tiny-engram.toml",
    "bigram": f"{RECIPES}/controls/bigram.toml",
    "one-row": f"{RECIPES}/tiny-engram.toml@one-row",
}
CORPORA = ("factbook", "prose")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--corpora", nargs="+", default=list(CORPORA))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every recipe")
    args = parser.parse_args()
    tables = [study(corpus, args) for corpus in args.corpora]
    print("\n".join(tables))


def study(corpus: str, args: argparse.Namespace) -> str:
    """All models on one corpus; the table, with differences from the first model."""
    settings = {"data.corpus": f'"{corpus}"', "train.eval_every": "0"}
    settings |= dict(setting.split("=", 1) for setting in args.set)
    variants = plan([f"{name}={MODELS[name]}" for name in args.models], [f"{k}={v}" for k, v in settings.items()])
    results, failures = run_lab(
        variants,
        args.seeds,
        args.out / corpus,
        args.jobs,
        finished=lambda cell, result: print(f"{corpus} {cell.name}: {json.dumps(result)}", flush=True),
    )
    if failures:
        raise SystemExit(f"not all runs of {corpus} came to their end, and the same command goes on: {failures}")
    made = rows(variants, results)
    return f"\n{corpus}, {args.seeds} seeds, {made[0].runs[0]['tokens']:,} tokens\n\n{markdown(made, args.seeds)}"


if __name__ == "__main__":
    main()
