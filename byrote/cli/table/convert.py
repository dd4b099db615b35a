"""`byrote table convert`: tables in another codec."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from byrote.cli.output import progress, terminal


class Codec(StrEnum):
    """How a row is stored (`byrote.tables.codecs`)."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp8 = "fp8"
    int8 = "int8"
    int4 = "int4"


def convert(
    source: Annotated[Path, typer.Argument(help="A table file; or a model or run folder, for all its tables.")],
    target: Annotated[Path, typer.Argument(help="The new file; or the new model folder.")],
    codec: Annotated[Codec, typer.Option(help="How rows are stored.")],
    check: Annotated[
        Path | None, typer.Option(help="A run folder: measure the loss on its validation text too.")
    ] = None,
) -> None:
    """Write tables in another codec; state the errors, and what they cost.

    \b
    byrote table convert runs/tiny OUT --codec int8 --check runs/tiny
    """
    from byrote.tables.placements.file import FileTable

    console = terminal()
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder; give a table file, or the folder of a model or a run")
    if check is not None and source.is_file():
        raise ValueError("--check measures a whole model: give a model or run folder, not a table file")
    if source.is_file():
        _convert(console, source.name, FileTable.open(source), target, codec)
        return
    before = _convert_model(console, source, target, codec)
    if check is not None:
        _check(console, before, target, check)


def _convert(console: Console, name: str, table: Any, target: Path, codec: str) -> None:
    from byrote.tables.files.convert import BOUNDS, convert

    with progress(console) as bar:
        task = bar.add_task(name, total=None)
        done = convert(table, target, codec, lambda at, of: bar.update(task, completed=at, total=of))
    smaller = f"{done.bytes_before:,} to {done.bytes_after:,} bytes ({done.bytes_after / done.bytes_before:.1%})"
    console.print(f"{name}: {smaller}", soft_wrap=True)
    console.print(f"  worst error a value may suffer in {codec}: {BOUNDS[codec]}", soft_wrap=True)
    measured = (
        f"{done.worst:.3g}, {done.share:.1%} of what its row allows; root mean square {done.rms:.3%} of the values"
    )
    console.print(f"  measured: {measured}", soft_wrap=True)


def _convert_model(console: Console, source: Path, target: Path, codec: str) -> Path:
    """The folder of the model that was converted. The config comes last: a folder with one is complete."""
    from byrote.cli.load import model_folder
    from byrote.data.tokenizer import load_tokenizer
    from byrote.models.engram import EngramForCausalLM

    found = model_folder(source)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: choose another folder")
    model = EngramForCausalLM.from_pretrained(found, placement="file")
    if model.memory_stack is None:
        raise ValueError(f"{found}: the model has no memory, so there are no tables to convert")
    for layer, memory in model.memory_stack.items():
        path = model.memory_stack.table_path(target, layer)
        _convert(console, path.name, memory.table, path, codec)
    if (found / "tokenizer.json").is_file():
        load_tokenizer(found).save_pretrained(target)
    model.save_pretrained(target, tables=False)
    console.print(f"wrote {target}", soft_wrap=True)
    return found


def _check(console: Console, before: Path, after: Path, run: Path) -> None:
    with console.status("measuring the validation loss"):
        first, second = _score(before, run), _score(after, run)
    change = f"{first.loss:.5f} before, {second.loss:.5f} after, {second.loss - first.loss:+.5f} nats a token"
    console.print(f"validation loss on {first.tokens:,} tokens: {change}", soft_wrap=True)


def _score(model_folder: Path, run: Path) -> Any:
    """Of the model in a folder, tables read in place, on the validation text of a run, as its training measured it."""
    from byrote.models.engram import EngramForCausalLM
    from byrote.train.evaluate import evaluate
    from byrote.train.recipe import Recipe
    from byrote.train.run import prepare_data, validation_of

    if not (run / "recipe.json").is_file():
        raise ValueError(f"{run} is no run folder (it has no recipe.json): give the run whose text is to be measured")
    recipe = Recipe.load(run / "recipe.json")
    validation = validation_of(recipe, *prepare_data(recipe, lambda what, done, total: None))
    model = EngramForCausalLM.from_pretrained(model_folder, placement="file")
    return evaluate(model, validation, recipe.train.precision)
