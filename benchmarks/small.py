"""MoE against Engram at the size of one GPU, three seeds, on a text that every machine has: Python's own library.

    python benchmarks/small.py --device cuda --out runs/gpu/small

recipes/small-moe.toml and small-engram.toml, of equal total and active parameters, trained as `byrote lab run` does. A
run that is done is not run again, and one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from pathlib import Path

from byrote.lab.studies.plan import plan
from byrote.lab.studies.report import markdown, rows
from byrote.lab.studies.runner import run_lab
from byrote.train.recipe import RECIPES

QUICK = {"model.preset": '"nano"', "data.length": "64", "data.vocab_size": "1024", "train.steps": "3"}
QUICK |= {
    "model.num_hidden_layers": "6",
    "train.batch_size": "2",
    "train.warmup": "1",
    "train.eval_batches": "1",
    "train.eval_every": "0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/small"))
    parser.add_argument("--quick", action="store_true", help="the nano preset, three steps: does it run?")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of both recipes")
    args = parser.parse_args()
    library = Path(sysconfig.get_path("stdlib"))
    pattern = library / ("json/*.py" if args.quick else "*/*.py")
    settings = {"data.corpus": json.dumps(f"files:{pattern}"), "data.folder": json.dumps(str(args.out / "data"))}
    settings |= {"train.device": json.dumps(args.device)}
    settings |= dict(setting.split("=", 1) for setting in args.set)
    settings |= QUICK if args.quick else {}
    recipes = [f"{name}={RECIPES}/small-{name}.toml" for name in ("moe", "engram")]
    variants = plan(recipes, [f"{key}={value}" for key, value in settings.items()])
    results, failures = run_lab(
        variants,
        args.seeds,
        args.out,
        prepared=lambda what, done, total: None if done else print(f"corpus: {what}", flush=True),
        finished=lambda cell, result: print(f"{cell.name}: {json.dumps(result)}", flush=True),
    )
    print(markdown(rows(variants, results), args.seeds))
    if failures:
        raise SystemExit(f"not all runs came to their end, and the same command goes on: {failures}")


if __name__ == "__main__":
    main()
