"""Do concepts help at equal FLOPs? DLCM at several R against a plain model, over seeds; the numbers are in docs/log.md.

    python benchmarks/concepts.py --out runs/concepts --jobs 2

llama    recipes/llama-SHAPE.toml     the baseline, of the FLOPs per token that DLCM has at R = 4 (within 1 %, asserted)
dlcm     recipes/dlcm-SHAPE.toml      at R = 2, 4, 8: one shape, so that only R = 4 costs what the baseline does

Losses per token, per second and per FLOP; the compression that came out, over training, against R; losses by the place
in a concept. A run that is done is not run again (byrote/lab/studies/runner.py). `OUT/report.json` has the numbers,
`OUT/*.png` the pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import AutoModelForCausalLM

import byrote  # noqa: F401  registers the models
from byrote.data.packing import Batch, Tokens, validation_batches
from byrote.lab.inspect.concept_losses import by_index, token_losses
from byrote.lab.studies.plan import Variant, cells, plan
from byrote.lab.studies.report import Results
from byrote.lab.studies.runner import run_lab
from byrote.lab.studies.statistics import Summary, paired, summarize
from byrote.models.counts import count
from byrote.models.families import config_class
from byrote.train.checkpoint import latest
from byrote.train.metrics import read_metrics
from byrote.train.recipe import RECIPES, Recipe
from byrote.train.run import data_folder

Folders = dict[tuple[str, int], Path]

QUICK = ["train.steps=3", "train.batch_size=2", "train.warmup=1", "train.eval_batches=1", "train.eval_every=0"]
QUICK += ["data.length=64", "train.log_every=1"]
TOLERANCE = 0.01  # of FLOPs per token
LATE = 0.8  # the share of the steps behind which compression counts as that of the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/concepts"))
    parser.add_argument("--shape", choices=("tiny", "small"), default="tiny", help="minutes on a CPU, or for a GPU")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="three steps of small rows: does it run?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--ratios", type=float, nargs="+", default=[4.0, 2.0, 8.0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every recipe")
    parser.add_argument("--batches", type=int, default=40, help="of validation, for losses by place in a concept")
    args = parser.parse_args()
    check_flops(args.shape)
    settings = [f'train.device="{args.device}"', *(QUICK if args.quick else []), *args.set]
    llama = plan([f"llama={RECIPES}/llama-{args.shape}.toml"], settings)
    ratios = ",".join(str(ratio) for ratio in args.ratios)
    dlcm = plan([f"dlcm={RECIPES}/dlcm-{args.shape}.toml"], [*settings, f"model.compression_ratio={ratios}"])
    results, failures = run_lab(
        [*llama, *dlcm],
        args.seeds,
        args.out,
        args.jobs,
        keep=True,
        finished=lambda cell, result: print(f"{cell.name}: {json.dumps(result)}", flush=True),
    )
    if failures:
        raise SystemExit(f"not all runs came to their end, and the same command goes on: {failures}")
    folders = {(cell.variant.name, cell.seed): cell.folder for cell in cells([*llama, *dlcm], args.seeds, args.out)}
    report = [describe(variant, results, llama[0], folders, args.batches) for variant in [*llama, *dlcm]]
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))
    plots(report, args.out)


def check_flops(shape: str) -> None:
    """AssertionError unless the recipes of DLCM and of the baseline cost a token the same."""
    recipes = [Recipe.load(RECIPES / f"{name}-{shape}.toml") for name in ("dlcm", "llama")]
    costs = [count(_config(recipe), recipe.data.length).flops_per_token for recipe in recipes]
    assert abs(costs[0] / costs[1] - 1) <= TOLERANCE, costs


def _config(recipe: Recipe) -> Any:
    return config_class(recipe.model.preset).from_preset(recipe.model.preset, **recipe.model.overrides)


def describe(variant: Variant, results: Results, baseline: Variant, folders: Folders, batches: int) -> dict[str, Any]:
    runs = results[variant.name]
    losses = {seed: run["val_loss"] for seed, run in runs.items()}
    others = {seed: run["val_loss"] for seed, run in results[baseline.name].items()}
    flops = count(_config(variant.recipe), variant.recipe.data.length).flops_per_token
    report: dict[str, Any] = {
        "name": variant.name,
        "loss": _numbers(summarize(list(losses.values()))),
        "minus_baseline": None if variant is baseline else _numbers(paired(losses, others)),
        "seconds": fmean(run["seconds"] for run in runs.values()),
        "tokens": next(iter(runs.values()))["tokens"],
        "flops_per_token": flops,
        "parameters": next(iter(runs.values()))["params_total"],
    }
    report["curves"] = {seed: read_metrics(folders[variant.name, seed] / "metrics.jsonl") for seed in runs}
    if variant is baseline:
        return report
    report["target"] = _config(variant.recipe).compression_ratio
    report["compression"] = {seed: _compression(curve) for seed, curve in report["curves"].items()}
    report["by_index"] = {}
    for seed in runs:
        pair = [AutoModelForCausalLM.from_pretrained(latest(folders[v.name, seed])) for v in (variant, baseline)]
        report["by_index"][seed] = by_index(*(token_losses(model, _spread(variant.recipe, batches)) for model in pair))
    return report


def _spread(recipe: Recipe, count: int) -> list[Batch]:
    """About so many batches of validation, from all over it."""
    data = Tokens.open(data_folder(recipe), "validation")
    batches = list(validation_batches(data, recipe.train.batch_size, recipe.data.length))
    return batches[:: max(1, len(batches) // count)]


def _compression(curve: list[dict]) -> dict[str, float]:
    """Tokens per concept at the end: as drawn in training, over its last steps, and by the threshold on validation."""
    steps = curve[-1]["step"]
    late = [r["tokens_per_concept"] for r in curve if "tokens_per_concept" in r and r["step"] > LATE * steps]
    # The rate is what is held, so its mean counts.
    drawn = 1 / fmean(1 / ratio for ratio in late)
    return {"training": drawn, "validation": [r for r in curve if "val_loss" in r][-1]["val_tokens_per_concept"]}


def _numbers(summary: Summary | None) -> dict[str, float] | None:
    return None if summary is None else {"mean": summary.mean, "sd": summary.sd, "half": summary.half}


def table(report: list[dict]) -> str:
    lines = [
        "| model | validation loss | minus llama | FLOPs a token | seconds | parameters "
        "| tokens a concept: trained, validation |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report:
        difference = row["minus_baseline"]
        lines.append(
            f"| {row['name']} | {row['loss']['mean']:.4f} (sd {row['loss']['sd']:.4f}) "
            f"| {'' if difference is None else '{mean:+.4f} ± {half:.4f}'.format(**difference)} "
            f"| {row['flops_per_token']:,} | {row['seconds']:.0f} | {row['parameters']:,} | {_compressed(row)} |"
        )
    return "\n".join(lines)


def _compressed(row: dict) -> str:
    found = row.get("compression")
    if not found:
        return ""
    return "; ".join(f"{each['training']:.2f}, {each['validation']:.2f}" for each in found.values())


def plots(report: list[dict], out: Path) -> None:
    """loss.png: validation loss over tokens, FLOPs and seconds; compression.png; by_index.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=120, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for color, row in enumerate(report):
        for panel, unit in zip(panels, ("tokens", "FLOPs", "seconds"), strict=True):
            for seed, curve in row["curves"].items():
                points = [r for r in curve if "loss" in r and "val_loss" not in r]
                scale = row["flops_per_token"] if unit == "FLOPs" else 1
                x = [r["seconds"] if unit == "seconds" else r["tokens"] * scale for r in points]
                label = row["name"] if seed == min(row["curves"]) else None
                panel.plot(x, _smooth([r["loss"] for r in points]), color=f"C{color}", lw=1, alpha=0.8, label=label)
            panel.set_xlabel(f"training {unit}")
            panel.grid(alpha=0.25)
    panels[0].set_ylabel("training loss, nats per token, smoothed")
    panels[0].legend(frameon=False)
    figure.savefig(out / "loss.png")

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for color, row in enumerate(report[1:], start=1):
        for curve in row["curves"].values():
            points = [(r["step"], r["tokens_per_concept"]) for r in curve if "tokens_per_concept" in r]
            axes.plot(*zip(*points, strict=True), color=f"C{color}", lw=1, alpha=0.8)
        axes.axhline(row["target"], color=f"C{color}", ls="--", lw=1, label=f"target {row['target']:g}")
    axes.set_yscale("log", base=2)
    axes.set_xlabel("step")
    axes.set_ylabel("tokens a concept, as drawn")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(out / "compression.png")

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for color, row in enumerate(report[1:], start=1):
        for seed, rows in row["by_index"].items():
            points = [(i, ours - theirs) for i, tokens, ours, theirs in rows if tokens >= 30]
            label = row["name"] if seed == min(row["by_index"]) else None
            axes.plot(*zip(*points, strict=True), color=f"C{color}", marker="o", ms=3, lw=1, alpha=0.8, label=label)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlabel("tokens since the newest concept formed")
    axes.set_ylabel("loss minus the baseline's at the same tokens")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(out / "by_index.png")


def _smooth(values: list[float], window: int = 5) -> list[float]:
    return [fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


if __name__ == "__main__":
    main()
