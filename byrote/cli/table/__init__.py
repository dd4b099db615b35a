"""`byrote table`: look at tables and measure them, one file a verb."""

import typer

from byrote.cli.table.bench import bench
from byrote.cli.table.convert import convert
from byrote.cli.table.info import info
from byrote.cli.table.stats import stats
from byrote.cli.table.verify import verify

table = typer.Typer(no_args_is_help=True, help="Tables: what is in them, how they are read.")


@table.callback()
def _table() -> None:
    """Tables: what is in them, how they are read."""


for _verb in (info, verify, convert, stats, bench):
    table.command()(_verb)
