"""`byrote lab mup-check`: do activations, and the best rate, stay as they are when a DLCM gets wider?"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from byrote.cli.output import terminal, write


def mup_check(
    base: Annotated[int, typer.Option(help="The base width; others are 2, 4, 8 times it.")] = 64,
    rate: Annotated[float, typer.Option(help="The rate at the base width.")] = 5e-3,
    seeds: Annotated[int, typer.Option(help="Largest spread, mean loss of so many.")] = 1,
    text: Annotated[Path | None, typer.Option(help="A corpus of `byrote data`: sweep rates on it.")] = None,
    steps: Annotated[int, typer.Option(help="Of a training in the sweep.")] = 200,
    plot: Annotated[Path, typer.Option(help="The picture.")] = Path("runs/mup-check.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here too.")] = None,
) -> None:
    """Check decoupled muP on a small DLCM, with and without.

    \b
    Spread: largest over smallest root mean square of a stage's output, over
    four widths, after 10 steps. With muP it should be below 2.
    With --text: the best learning rate of the base width and of 4 times it.
    """
    from rich.table import Table

    from byrote.data.packing import Tokens
    from byrote.lab.studies.mup.check import STAGES, Options, check
    from byrote.lab.studies.mup.coordinates import plot_coordinates

    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; give at least 1")
    if text is not None:
        Tokens.open(text, "train")  # or an error, before the work
    console = terminal()
    cases = [(varied, mup) for varied in ("token", "concept") for mup in (True, False)]
    names = [f"{varied}, {'muP' if mup else 'standard'}" for varied, mup in cases]
    found: dict[str, list[Any]] = {name: [] for name in names}
    with console.status("training"):
        for seed in range(seeds):
            for name, case in zip(names, cases, strict=True):
                found[name].append(check(Options(base, rate, seed=seed), *case))
    shown = Table("width varied:", *names, box=None, pad_edge=False)
    spreads = {name: {stage: max(one.spread(stage) for one in found[name]) for stage in STAGES} for name in names}
    for stage in STAGES:
        shown.add_row(stage, *(f"{spreads[name][stage]:.2f}" for name in names))
    console.print(shown)
    plot_coordinates({name: checks[0] for name, checks in found.items()}, plot)
    console.print(f"\n{plot}", soft_wrap=True)
    content: dict[str, Any] = {"base": base, "rate": rate, "seeds": seeds, "spreads": spreads}
    content["rms"] = {name: [one.rms.tolist() for one in checks] for name, checks in found.items()}
    if text is not None:
        content["sweep"] = _sweep(console, [Options(base, rate, seed=seed) for seed in range(seeds)], text, steps)
    if json_file:
        write(json_file, json.dumps(content, indent=2) + "\n")


def _sweep(console: Console, seeds: list[Any], text: Path, steps: int) -> dict[str, Any]:
    import numpy as np
    from rich.table import Table

    from byrote.data.tokenizer import load_tokenizer
    from byrote.lab.studies.mup.check import sweep
    from byrote.lab.studies.mup.transfer import Transfer

    rates = [seeds[0].rate * 2.0**power for power in range(-4, 4)]
    vocab_size = len(load_tokenizer(text / "tokenizer"))
    content = {}
    shown = Table("rate", box=None, pad_edge=False)
    columns = [[f"{rate:.3g}" for rate in rates]]
    for name, mup in (("muP", True), ("standard", False)):
        with console.status(f"sweep, {name}"):
            each = [sweep(options, text, vocab_size, steps, rates, mup) for options in seeds]
        swept = Transfer(each[0].widths, rates, np.mean([one.losses for one in each], axis=0))
        for width, losses, best in zip(swept.widths, swept.losses, swept.best, strict=True):
            shown.add_column(f"{name}, {width}")
            columns.append([f"{loss:.3f}{' best' if r == best else ''}" for r, loss in zip(rates, losses, strict=True)])
        content[name] = {"widths": swept.widths, "losses": swept.losses.tolist(), "best": swept.best, "rates": rates}
        content[name] |= {"shift": swept.shift, "at_an_end": swept.at_an_end}
        content[name]["seeds"] = [{"losses": one.losses.tolist(), "shift": one.shift} for one in each]
    for row in zip(*columns, strict=True):
        shown.add_row(*row)
    console.print()
    console.print(shown)
    for name, one in content.items():
        beyond = ", at an end of the grid" if one["at_an_end"] else ""
        of_each = ", ".join(f"{seed['shift']:+d}" for seed in one["seeds"])
        console.print(
            f"{name}: the best rate moves by {one['shift']:+d} steps of a factor of 2{beyond} (each seed: {of_each})",
            soft_wrap=True,
            highlight=False,
        )
    return content
