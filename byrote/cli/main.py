"""`byrote VERB`. Each verb's file imports what is heavy inside its function, so that --help is quick."""

import os
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from byrote.cli.concepts import concepts
from byrote.cli.conformance import conformance
from byrote.cli.data import data
from byrote.cli.demo import demo
from byrote.cli.evaluate import evaluate
from byrote.cli.gates import gates
from byrote.cli.generate import generate
from byrote.cli.info import info
from byrote.cli.lab import lab
from byrote.cli.plot import plot
from byrote.cli.table import table
from byrote.cli.train import train


class _Verbs(TyperGroup):
    """What the user gave, or the machine lacks, is one message and exit status 2, without a traceback. Anything else is
    a bug and shows one. So a verb catches nothing: what it calls raises a ValueError or an OSError that names the file.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # as in `byrote data | head`: nobody reads on
            raise
        except (ValueError, OSError, MemoryError) as error:
            message = Text.assemble(("error: ", "bold red"), _said(error))
            Console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(2) from None


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or ("out of memory" if isinstance(error, MemoryError) else repr(error))


app = typer.Typer(
    cls=_Verbs,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        import byrote as package

        typer.echo(package.__version__)
        raise typer.Exit


@app.callback()
def byrote(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Language models that look things up: train, run and look into them."""


for _verb in (demo, data, train, evaluate, plot, generate, gates, concepts, info, conformance):
    app.command("eval" if _verb is evaluate else None)(_verb)
app.add_typer(lab, name="lab")
app.add_typer(table, name="table")
