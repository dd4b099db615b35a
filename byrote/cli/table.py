"""`byrote table`: what concerns tables by themselves. `byrote table bench`: how fast they are here."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

table = typer.Typer(no_args_is_help=True, help="Tables by themselves.")


@table.callback()
def _table() -> None:
    """Tables by themselves."""


@table.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Small tables: seconds, not minutes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here too.")] = None,
) -> None:
    """Measure tables against what else there is, on one core."""
    import platform

    import torch
    from rich.table import Table

    from byrote.lab.table_bench import Options, run, state_bytes

    console = Console()
    shown = Table(box=None, pad_edge=False)
    for column in ("what", "ms", "theirs", "ratio", "range", "goal", ""):
        shown.add_column(column, justify="left" if column in ("what", "") else "right", no_wrap=column != "what")
    rows = []
    with console.status("measuring"):
        for row in run(Options(quick)):
            rows.append(row)
            goal = "" if row.target is None else f"{row.target:g}"
            verdict = {None: "", True: "met", False: "not met"}[row.met]
            spread = f"{min(row.ratios):.2f}-{max(row.ratios):.2f}"
            numbers = (f"{row.ours_ms:.2f}", f"{row.theirs_ms:.2f}", f"{row.ratio:.2f}", spread, goal, verdict)
            shown.add_row(f"{row.what}; against {row.against}", *numbers)
    sizes = state_bytes()
    console.print(shown)
    console.print("ratio: their time over ours, the median of the rounds, and the range")
    for size in sizes:
        console.print(
            f"state of {size['rule']}: {size['bytes']:.3f} bytes for each {size['of each']} ({size['target']})",
            highlight=False,
        )
    if json_file:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
        content = {"machine": machine, "quick": quick, "rows": [row.to_dict() for row in rows], "state": sizes}
        json_file.write_text(json.dumps(content, indent=2) + "\n")
