"""The table of a lab: for each variant the mean over its seeds, its spread, and the paired difference from a baseline.

Baseline: of another recipe, the first recipe at the same values; of the first recipe, its first values. Losses on
different data are not compared: the data.* values must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from byrote.lab.studies.plan import Variant
from byrote.lab.studies.statistics import Summary, paired, summarize

Results = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> what the run says


@dataclass(frozen=True)
class Row:
    variant: Variant
    loss: Summary
    difference: Summary | None
    baseline: str
    runs: list[dict[str, Any]]


def rows(variants: list[Variant], results: Results) -> list[Row]:
    """A row for each variant of which a run is done."""
    made = []
    for variant in variants:
        if runs := results.get(variant.name):
            base = baseline(variant, variants)
            losses, other = losses_of(results, variant), losses_of(results, base) if base else {}
            difference = paired(losses, other)
            ordered = [runs[seed] for seed in sorted(runs)]
            name = base.name if base and difference else ""
            made.append(Row(variant, summarize(list(losses.values())), difference, name, ordered))
    return made


def baseline(variant: Variant, variants: list[Variant]) -> Variant | None:
    for other in variants:
        comparable = other.data_values == variant.data_values and other.model == variants[0].model
        if comparable and (variant.model == other.model or variant.values == other.values):
            return None if other is variant else other
    return None


def losses_of(results: Results, variant: Variant) -> dict[int, float]:
    return {seed: run["val_loss"] for seed, run in sorted(results.get(variant.name, {}).items())}


def markdown(table: list[Row], seeds: int) -> str:
    baselines = {row.baseline for row in table if row.baseline}
    one = len(baselines) == 1
    header = f"loss minus {next(iter(baselines))}" if one else "paired difference"
    lines = [
        f"| model | validation loss | bits per byte | {header} | seconds | parameters | active |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        name, runs = row.variant.name, row.runs
        if len(runs) < seeds:
            name += f" ({len(runs)} of {seeds} seeds)"
        difference = ""
        if row.difference:
            difference = f"{row.difference.mean:+.4f} ± {row.difference.half:.4f}"
            difference += "" if one else f" from {row.baseline}"
        bits, seconds = fmean(run["bits_per_byte"] or 0.0 for run in runs), fmean(run["seconds"] for run in runs)
        lines.append(
            f"| {name} | {row.loss.mean:.4f} (sd {row.loss.sd:.4f}) | {bits:.4f} | {difference} | {seconds:.0f} "
            f"| {runs[0]['params_total']:,} | {runs[0]['params_active']:,} |"
        )
    return "\n".join(lines)
