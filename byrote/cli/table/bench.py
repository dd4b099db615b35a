"""`byrote table bench`: tables against what else there is, on one core."""

import json
from pathlib import Path
from typing import Annotated

import typer

from byrote.cli.output import terminal, write


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Small tables: seconds, not minutes.")] = False,
    folder: Annotated[
        Path | None,
        typer.Option(help="Read files of 10 GB too, and decode with them (quick: 0.3 GB); made here, then deleted."),
    ] = None,
    fbgemm: Annotated[
        Path | None, typer.Option(help="A Python interpreter that has FBGEMM (fbgemm-gpu-cpu), to compare with.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here too.")] = None,
) -> None:
    """Measure tables against what else there is, on one core."""
    import platform

    import torch
    from rich.table import Table

    from byrote.lab.bench import run
    from byrote.lab.bench.files import engramdb_is_there
    from byrote.lab.bench.ratios import Options
    from byrote.lab.bench.update import state_bytes
    from byrote.train.allocator import keep_freed_memory

    keep_freed_memory()  # as in training: pages that each round has to ask for again are noise, ours and theirs
    console = terminal()
    shown = Table(box=None, pad_edge=False)
    for column in ("what", "ms", "theirs", "ratio", "range", "goal", ""):
        shown.add_column(column, justify="left" if column in ("what", "") else "right", no_wrap=column != "what")
    rows = []
    with console.status("measuring"):
        for row in run(Options(quick, folder=folder, fbgemm=fbgemm)):
            rows.append(row)
            goal = "" if row.target is None else f"{row.target:g}"
            goal = goal if row.limit is None else f"at most {row.limit:g}"
            verdict = {None: "", True: "met", False: "not met"}[row.met]
            spread = f"{min(row.ratios):.2f}-{max(row.ratios):.2f}"
            numbers = (f"{row.ours_ms:.2f}", f"{row.theirs_ms:.2f}", f"{row.ratio:.2f}", spread, goal, verdict)
            shown.add_row(f"{row.what}; against {row.against}", *numbers)
    sizes = state_bytes()
    console.print(shown)
    console.print(
        "ratio: their time over ours (with a goal of at most: ours over theirs); median of the rounds, and range"
    )
    if fbgemm is None:
        console.print(
            "FBGEMM: not measured, give --fbgemm PYTHON of an environment with fbgemm-gpu-cpu==1.8.0, torch==2.13.0"
        )
    if folder is None:
        console.print("rows out of a file: not measured, give a --folder with 12 GB of space")
    elif not engramdb_is_there():
        console.print("engramdb-python: not installed, so there are no rows against it")
    memory = None
    if folder is not None:
        from byrote.lab.bench.decode import decode_memory, memory_line

        memory = decode_memory(Options(quick, folder=folder))
        console.print(memory_line(memory))
    for size in sizes:
        what = f"state of {size['rule']}, rows of {size['width']}: {size['bytes']:.3f} bytes for each {size['of each']}"
        console.print(f"{what}, {size['resident']:.3f} in memory ({size['target']})")
    if json_file:
        machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
        content = {
            "machine": machine,
            "quick": quick,
            "rows": [row.to_dict() for row in rows],
            "state": sizes,
            "decode": memory,
        }
        write(json_file, json.dumps(content, indent=2) + "\n")
