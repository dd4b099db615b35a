"""The picture of a fit: predicted against observed losses, residuals over tokens, and the loss over P at one cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from byrote.lab.studies.dlcm_scaling.decay import DecayFit
from byrote.lab.studies.dlcm_scaling.fit import LawFit
from byrote.lab.studies.dlcm_scaling.law import size_at
from byrote.tables.log.disk import naming


def plot_scaling(law: LawFit | None, decay: DecayFit | None, cost: float, path: Path) -> None:
    """One row of panels: three of the law, one of the decay, as far as they were fitted."""
    from matplotlib.figure import Figure

    count = 3 * (law is not None) + (decay is not None)
    figure = Figure(figsize=(4.4 * count, 4), dpi=120, layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    if law is not None:
        _law(law, cost, panels)
    if decay is not None:
        _against(panels[-1], decay.observed, decay.predicted, decay.runs.r)
        panels[-1].set_title(f"Eq. 23: what the decay gains, R² {decay.r2:.3f}")
    for panel in panels:
        panel.grid(True, alpha=0.25)
        panel.legend(frameon=False, fontsize=8)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _law(fit: LawFit, cost: float, panels: list[Any]) -> None:
    runs = fit.runs
    _against(panels[0], runs.loss, fit.predicted, runs.r)
    panels[0].set_title(f"Eq. 22: loss, R² {fit.r2:.4f}")
    for color, r in enumerate(np.unique(runs.r)):
        mine = runs.r == r
        panels[1].plot(runs.d[mine], 100 * fit.residuals[mine], f"C{color}.", ms=4, label=f"R = {r:g}")
        shares = np.linspace(0.02, 0.98, 200)
        losses = fit.law.loss(size_at(cost, r, shares), runs.d.max(), r, shares)
        best = fit.law.best_share(cost, r)
        at = float(fit.law.loss(size_at(cost, r, best), runs.d.max(), r, best))
        panels[2].plot(shares, losses, f"C{color}", label=f"R = {r:g}, best P {best:.2f}")
        panels[2].plot([best], [at], f"C{color}o", ms=6)
    panels[1].axhline(0, color="gray", lw=1)
    panels[1].set_xscale("log")
    panels[1].set_xlabel("D, tokens (log)")
    panels[1].set_ylabel("observed over predicted, %")
    panels[1].set_title("residuals")
    panels[2].axvspan(runs.p.min(), runs.p.max(), color="gray", alpha=0.12, lw=0, label="P of the runs")
    panels[2].set_xlabel("P, share of the concept layers")
    panels[2].set_ylabel(f"predicted loss at D = {runs.d.max():.3g}")
    panels[2].set_title(f"{cost:.3g} parameters a token")


def _against(panel: Any, observed: np.ndarray, predicted: np.ndarray, r: np.ndarray) -> None:
    for color, value in enumerate(np.unique(r)):
        panel.plot(observed[r == value], predicted[r == value], f"C{color}.", ms=4, label=f"R = {value:g}")
    ends = [min(observed.min(), predicted.min()), max(observed.max(), predicted.max())]
    panel.plot(ends, ends, color="gray", lw=1)
    panel.set_xlabel("observed")
    panel.set_ylabel("predicted")
