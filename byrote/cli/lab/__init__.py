"""`byrote lab`: studies of several runs, one file a verb."""

import typer

from byrote.cli.lab.dlcm_scaling import dlcm_scaling
from byrote.cli.lab.mup_check import mup_check
from byrote.cli.lab.run import run

lab = typer.Typer(no_args_is_help=True, help="Studies of several runs.")


@lab.callback()
def _lab() -> None:
    """Studies: several runs, one table."""


for _verb in (run, dlcm_scaling, mup_check):
    lab.command()(_verb)
