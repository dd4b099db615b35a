"""byrote conformance: run vectors that another engine wrote, and name the first divergence of each case."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def conformance(
    hash: Annotated[Path | None, typer.Option(help="JSON file of the format engram-hash-golden/1.")] = None,
    forward: Annotated[
        Path | None, typer.Option(help="Safetensors file of the format engram-forward-golden/1.")
    ] = None,
) -> None:
    """Check this library against golden vectors (docs/formats.md)."""
    from byrote.lab.conformance.forward import check_forward_file
    from byrote.lab.conformance.hash import check_hash_file

    passed = failed = 0
    for path, check in ((hash, check_hash_file), (forward, check_forward_file)):
        for case in check(path) if path else ():
            typer.echo(case.line())
            passed, failed = passed + case.passed, failed + case.failed
    if not passed + failed:
        raise ValueError("no case to check; give --hash FILE.json, --forward FILE.safetensors, or both")
    typer.echo(f"{passed} passed, {failed} failed")
    if failed:
        raise typer.Exit(1)
