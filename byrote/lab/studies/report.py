"""The table of a lab: for each variant the mean over its seeds, its spread, and the paired difference from a baseline.

Baseline: of another recipe, the first recipe at the same values; of the first recipe, its first values. Losses of
different corpora, tokenizers or rows are of other tokens and are not compared: each data has a first recipe of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from byrote.lab.studies.plan import Variant
from byrote.lab.studies.statistics import Summary, paired, summarize

OTHER_DATA = (
    "Losses of different corpora, tokenizers or row lengths are not compared: differences are within one of them."
)

Results = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> what the run says


@dataclass(frozen=True)
class Row:
    """One variant in the table of a study: its losses over seeds, and their paired differences to the baseline."""

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
    alike = [other for other in variants if other.data == variant.data]
    for other in alike:
        if other.model == alike[0].model and (variant.model == other.model or variant.values == other.values):
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
            half = f" ± {row.difference.half:.4f}" if row.difference.n > 1 else ""  # one seed has no spread
            difference = f"{row.difference.mean:+.4f}{half}" + ("" if one else f" from {row.baseline}")
        spread = f" (sd {row.loss.sd:.4f})" if row.loss.n > 1 else ""
        bits, seconds = fmean(run["bits_per_byte"] for run in runs), fmean(run["seconds"] for run in runs)
        lines.append(
            f"| {name} | {row.loss.mean:.4f}{spread} | {bits:.4f} | {difference} | {seconds:.0f} "
            f"| {runs[0]['params_total']:,} | {runs[0]['params_active']:,} |"
        )
    if any(row.variant.data != table[0].variant.data for row in table):
        lines += ["", OTHER_DATA]
    return "\n".join(lines)
