"""The coordinate check of muP: are activations as large at every width, before and after a few steps?

A stage is a named module; its coordinate is the root mean square of its output, all tokens together, in the training
forward. It is recorded in every forward of `steps` steps and once after the last. Under muP it should not depend on the
width (2203.03466, appendix D.1); logits fall with the root of the width at step 0, and no more once they have learned.

Shapes: rms [widths, steps + 1, stages].  Left out: padding, which would count as activations: give batches without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from byrote.tables.log.disk import naming

Batches = Callable[[int], Mapping[str, Any]]  # step -> arguments of the forward, which returns a `.loss`
Make = Callable[[int], tuple[nn.Module, Batches]]  # width -> a new model, its batches
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Root mean squares of activations, float64 [widths, steps, stages]."""

    widths: list[int]
    stages: list[str]
    rms: np.ndarray

    def spread(self, stage: str, step: int = -1) -> float:
        """The largest over the smallest coordinate of the widths; inf if one is 0 or not finite."""
        values = self.rms[:, step, self.stages.index(stage)]
        return float(values.max() / values.min()) if np.isfinite(values).all() and values.min() > 0 else float("inf")


def coordinates(
    make: Make, widths: Sequence[int], stages: Mapping[str, str], optimizer: MakeOptimizer, steps: int = 10
) -> Coordinates:
    """Train a new model of each width for `steps` steps. `stages`: what to call it -> the module's name."""
    if steps < 1 or not widths or not stages:
        raise ValueError(f"steps is {steps}, widths {list(widths)}, stages {list(stages)}: give at least one of each")
    rms = np.zeros((len(widths), steps + 1, len(stages)))
    for row, width in enumerate(widths):
        model, batches = make(width)
        model.train()
        modules = dict(model.named_modules())
        missing = [name for name in stages.values() if name not in modules]
        if missing:
            raise ValueError(f"{type(model).__name__} has no module {missing[0]!r}: take names of named_modules()")
        seen: dict[str, float] = {}
        hooks = [modules[name].register_forward_hook(_note(seen, stage)) for stage, name in stages.items()]
        updates = optimizer(model)
        for step in range(steps + 1):
            if step < steps:
                train_step(model, batches(step), updates)
            else:
                with torch.no_grad():
                    model(**batches(step))
            rms[row, step] = [seen[stage] for stage in stages]
        for hook in hooks:
            hook.remove()
    return Coordinates(list(widths), list(stages), rms)


def _note(seen: dict[str, float], stage: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        seen[stage] = float(first.detach().float().square().mean().sqrt())

    return hook


def train_step(model: nn.Module, batch: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> float:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def plot_coordinates(checks: Mapping[str, Coordinates], path: Path) -> None:
    """A row of panels for each check, a panel a stage: root mean square against width, one line a step."""
    from matplotlib.figure import Figure

    most = max(len(check.stages) for check in checks.values())
    figure = Figure(figsize=(2.6 * most, 2.6 * len(checks)), dpi=110, layout="constrained")
    panels = figure.subplots(len(checks), most, squeeze=False, sharex="row")
    for row, (name, check) in zip(panels, checks.items(), strict=True):
        for panel, stage in zip(row, check.stages, strict=False):
            values = check.rms[:, :, check.stages.index(stage)]
            for step in range(values.shape[1]):
                shade = 0.15 + 0.85 * step / max(1, values.shape[1] - 1)
                panel.plot(check.widths, values[:, step], "o-", ms=3, color=(0.1, 0.3, 0.6, shade))
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_title(f"{stage}\n{name}, spread {check.spread(stage):.2f}", fontsize=8)
            panel.tick_params(labelsize=7, which="both")
            panel.grid(True, alpha=0.25)
        row[0].set_ylabel("root mean square")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
