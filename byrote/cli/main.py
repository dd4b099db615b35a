"""`byrote VERB`. Each verb's file imports what is heavy inside its function, so that --help is quick."""

from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from byrote.cli.concepts import concepts
from byrote.cli.conformance import conformance
from byrote.cli.data import data
from byrote.cli.demo import demo
from byrote.cli.gates import gates
from byrote.cli.generate import generate
from byrote.cli.info import info
from byrote.cli.lab import lab
from byrote.cli.table import table
from byrote.cli.train import train


class _Verbs(TyperGroup):
    """A ValueError is the user's: one message, exit status 2, no traceback. Anything else is a bug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ValueError as error:
            message = Text.assemble(("error: ", "bold red"), str(error))
            Console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def byrote() -> None:
    """Language models that look things up: train, run and look into them."""


for _verb in (demo, data, train, generate, gates, concepts, info, conformance):
    app.command()(_verb)
app.add_typer(lab, name="lab")
app.add_typer(table, name="table")
