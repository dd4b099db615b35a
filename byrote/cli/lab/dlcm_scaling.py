"""`byrote lab dlcm-scaling`: the scaling laws of DLCM, fitted to the user's runs."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from byrote.cli.output import terminal, write


def dlcm_scaling(
    runs: Annotated[Path, typer.Argument(help="A .csv with a header, or a .json list of objects.")],
    fix: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, as t_data=0; may be repeated.")] = None,
    cost: Annotated[float | None, typer.Option(help="Parameters a token passes; else the runs' median.")] = None,
    plot: Annotated[Path, typer.Option(help="The picture.")] = Path("runs/dlcm-scaling.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here too.")] = None,
    seed: Annotated[int, typer.Option(help="Of the starts and the draws.")] = 0,
) -> None:
    """Fit the scaling laws of DLCM; say which share P of concept layers is best.

    \b
    Columns N, D, R, P, loss: Eq. 22. N, R, stable_loss, decayed_loss: Eq. 23.
    N parameters, D tokens, R tokens a concept, P share of N in concept layers.
    More runs than coefficients: 11 less those fixed. docs/dlcm.md has more.
    """
    import numpy as np

    from byrote.lab.studies.dlcm_scaling.data import read_runs
    from byrote.lab.studies.dlcm_scaling.decay import fit_decay
    from byrote.lab.studies.dlcm_scaling.fit import fit_law
    from byrote.lab.studies.dlcm_scaling.law import cost_of
    from byrote.lab.studies.dlcm_scaling.plot import plot_scaling

    console = terminal()
    fixed = _fixed(fix or [])
    for_law, for_decay = read_runs(runs)
    content: dict[str, Any] = {}
    law = decay = None
    if cost is not None and not (np.isfinite(cost) and cost > 0):
        raise ValueError(f"--cost is {cost:g}; give the parameters that a token passes, above 0")
    if for_law is None:
        if fixed or cost is not None:
            raise ValueError(f"--fix and --cost are of Eq. 22, for which {runs} has no column 'loss'")
        cost = 1.0  # has no say
    else:
        cost = cost or float(np.median(cost_of(for_law.n, for_law.r, for_law.p)))
        with console.status("fitting"):
            law = fit_law(for_law, np.random.default_rng(seed), fixed=fixed)
        content |= _show_law(console, law, cost)
    if for_decay is not None:
        decay = fit_decay(for_decay)
        content |= _show_decay(console, decay)
    plot_scaling(law, decay, cost, plot)
    console.print(f"\n{plot}", soft_wrap=True)
    if json_file:
        write(json_file, json.dumps(content, indent=2) + "\n")


def _fixed(settings: list[str]) -> dict[str, float]:
    fixed = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            fixed[name] = float(value)
        except ValueError:
            raise ValueError(f"--fix {setting}: write NAME=VALUE, as t_data=0") from None
    return fixed


def _show_law(console: Console, fit: Any, cost: float) -> dict[str, Any]:
    import numpy as np
    from rich.table import Table

    from byrote.lab.studies.dlcm_scaling.fit import NAMES

    off = 100 * np.abs(np.expm1(fit.residuals))
    worst = int(off.argmax())
    console.print(f"Eq. 22, {len(off)} runs", style="bold")
    shown = Table("coefficient", "value", "95 %", "", box=None, pad_edge=False)
    coefficients: dict[str, Any] = {}
    for name in NAMES:
        value, (low, high) = getattr(fit.law, name), fit.interval(lambda law, name=name: getattr(law, name))
        known = name not in fit.undetermined
        note = "fixed" if name in fit.fixed else "" if known else "not determined by these runs"
        shown.add_row(name, f"{value:.4g}", "" if name in fit.fixed else f"{low:.4g} to {high:.4g}", note)
        coefficients[name] = {"value": value, "low": low, "high": high, "determined": known}
    console.print(shown)
    console.print(
        f"R² {fit.r2:.4f}; off by {np.median(off):.2f} % in the median, by {off[worst]:.2f} % in run {worst + 1}; "
        f"{fit.agreeing} of {fit.starts} starts agree",
        highlight=False,
    )
    console.print(f"\nBest share of concept layers at {cost:.4g} parameters a token", style="bold")
    shown = Table("R", "P", "95 %", "", box=None, pad_edge=False)
    shares = []
    for r in np.unique(fit.runs.r).tolist():
        best = fit.law.best_share(cost, r)
        low, high = fit.interval(lambda law, r=r: law.best_share(cost, r))
        inside = bool(fit.runs.p.min() <= best <= fit.runs.p.max())
        note = "" if inside else f"outside of the runs, which have {fit.runs.p.min():g} to {fit.runs.p.max():g}"
        shown.add_row(f"{r:g}", f"{best:.3f}", f"{low:.3f} to {high:.3f}", note)
        shares.append({"R": r, "P": best, "low": low, "high": high, "inside_of_the_runs": inside})
    console.print(shown)
    law = {"runs": len(off), "r2": fit.r2, "coefficients": coefficients, "cost": cost, "best_share": shares}
    return {"law": law | {"starts": fit.starts, "agreeing": fit.agreeing, "residuals": fit.residuals.tolist()}}


def _show_decay(console: Console, fit: Any) -> dict[str, Any]:
    from rich.table import Table

    console.print(f"\nEq. 23, {len(fit.runs.n)} runs", style="bold")
    shown = Table("coefficient", "value", "95 %", box=None, pad_edge=False)
    coefficients = {}
    for name, (low, high) in fit.intervals.items():
        value = getattr(fit.decay, name)
        shown.add_row(name, f"{value:.4g}", f"{low:.4g} to {high:.4g}")
        coefficients[name] = {"value": value, "low": low, "high": high}
    console.print(shown)
    console.print(f"R² of the logarithms {fit.r2:.4f}")
    return {"decay": {"runs": len(fit.runs.n), "r2": fit.r2, "coefficients": coefficients}}
