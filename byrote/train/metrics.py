"""metrics.jsonl of a run: a line for each logged step and for each evaluation; and the picture of them.

{"step", "tokens", "seconds", "loss", "lr", "grad_norm", "tokens_per_second", "rows_touched", "max_violation"}
{"step", "tokens", "seconds", "val_loss", "bits_per_byte"}

With tables in files also "read_seconds", what reads of tables took since the process began, and "reads_hidden", the
share of that for which no step waited.

"loss" is of the next token, and comparable with "val_loss"; a model with prediction modules has their loss, unweighted,
as "mtp_loss" beside it, one with concepts "tokens_per_concept", as drawn, and "val_tokens_per_concept", by threshold.
"""

import json
from pathlib import Path
from typing import Any

from byrote.tables.log.disk import naming
from byrote.train.folder import replace_text


class Metrics:
    """Appends records to metrics.jsonl, from a step on: a resumed run writes no step twice."""

    def __init__(self, path: Path, step: int = 0, last: bool = False):
        """Continue at `step`: what an interrupted run wrote after its checkpoint is dropped.

        `last`: the step is the run's last one, behind whose checkpoint comes the last evaluation.
        """
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= step] if step else []
        if last:
            kept = [record for record in kept if record["step"] < step or "loss" in record]
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, **record: Any) -> None:
        with naming(self.path), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records, in order; none where there is no file. A last line that was not written to its end is left out.

    ValueError names the file and the line of any other damage.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
            if record is not None and not isinstance(record["step"], int):
                raise TypeError
        except (ValueError, TypeError, LookupError):
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number} is no record of a step: remove it, or the whole file"
                ) from None
            break
        if record is not None:
            records.append(record)
    return records


def plot_losses(runs: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """Training loss (thin, smoothed over the last tenth of what came before) and validation loss of each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for index, (name, records) in enumerate(runs.items()):
        color, name = f"C{index}", name.replace("$", r"\$")  # which would begin a formula
        train = [(record["tokens"], record["loss"]) for record in records if "loss" in record]
        partial = [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r and r["bits_per_byte"] is None]
        whole = [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r and r["bits_per_byte"] is not None]
        if train:
            label = None if partial or whole else f"{name}, training"
            axes.plot(
                [t for t, _ in train], _smooth([x for _, x in train]), color=color, lw=0.8, alpha=0.6, label=label
            )
        if partial:  # of other documents than the whole: no line between the two
            axes.plot(*zip(*partial, strict=True), color=color, marker="o", ms=3, lw=1.6, label=f"{name}, a part")
        if whole:
            label = f"{name}, all of validation ({whole[-1][1]:.3f})"
            line = "none" if partial else "-"
            axes.plot(*zip(*whole, strict=True), color=color, marker="D", ms=7, lw=1.6, ls=line, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.set_xlabel("training tokens (log)")
    axes.set_ylabel("loss, nats per token (log)")
    axes.set_title(f"{title}\nthick: validation; thin: training, smoothed", parse_math=False)
    axes.grid(True, which="both", alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _smooth(values: list[float]) -> list[float]:
    """Mean over the last tenth of the values so far: little smoothing where the curve is steep."""
    smoothed = []
    for i in range(len(values)):
        window = values[i - i // 10 : i + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed
