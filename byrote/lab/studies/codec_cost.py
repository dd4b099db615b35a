"""What a codec costs: the validation loss of a trained model with its tables as they are, and converted."""

from __future__ import annotations

from pathlib import Path

from byrote.data.packing import Tokens
from byrote.data.prepare import prepare
from byrote.models.engram import EngramForCausalLM
from byrote.train.evaluate import Score, Validation, evaluate
from byrote.train.recipe import Recipe
from byrote.train.run import data_folder


def validation_of(run: Path) -> tuple[Validation, str]:
    """The validation text of a run, as its training measured it, and the precision."""
    if not (run / "recipe.json").is_file():
        raise ValueError(f"{run} is no run folder (it has no recipe.json): give the run whose text is to be measured")
    recipe = Recipe.load(run / "recipe.json")
    folder = data_folder(recipe)
    meta = prepare(recipe.data.options, folder)
    size = recipe.train.micro_batch_size or recipe.train.batch_size
    text = Tokens.open(folder, "validation")
    return Validation(text, meta["validation"]["bytes"], size, recipe.data.length), recipe.train.precision


def score(model_folder: Path, run: Path) -> Score:
    """Of the model in a folder, tables read in place, on the run's validation text."""
    validation, precision = validation_of(run)
    model = EngramForCausalLM.from_pretrained(model_folder, placement="file")
    return evaluate(model, validation, precision)
