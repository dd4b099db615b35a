"""What a lab is to run: recipes x values x seeds, each a cell with a folder of its own.

A recipe is written [NAME=]PATH[@CONTROL]; NAME is the file's unless given. A setting is section.key=a,b,...: with one
value it changes every recipe, with several it makes one variant of each. Commas in brackets and quotes do not split.

A seed sets the weights, the order of the data (train.seed), the hash and the rows (model.memory_seed). A run has one
thread unless the recipe sets train.threads, so that results do not depend on how many run side by side.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from byrote.lab.studies.controls import CONTROLS
from byrote.models.families import PRESETS
from byrote.train.recipe import DataRecipe, Recipe

SEEDED = ("train.seed", "model.memory_seed")


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    model: str
    values: tuple[tuple[str, str], ...]  # of the keys that have several
    recipe: Recipe
    control: str

    @property
    def name(self) -> str:
        return " ".join([self.model, *(f"{key}={value}" for key, value in self.values)])

    @property
    def data(self) -> DataRecipe:
        """Losses compare only where this is equal: corpus, tokenizer, rows. In which folder it lies does not matter."""
        return replace(self.recipe.data, folder="")


@dataclass(frozen=True)
class Cell:
    """One run."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant.name} seed {self.seed}"

    @cached_property
    def recipe(self) -> Recipe:
        content = self.variant.recipe.to_dict()
        model, train = content["model"], content["train"]
        train |= {"seed": self.seed, "threads": train["threads"] or 1}
        if (PRESETS.get(model["preset"], {}) | model).get("memory_contract") != "deepseek_v41":  # which has no seed
            model["memory_seed"] = self.seed
        return Recipe.from_dict(content)


def plan(recipes: Iterable[str], settings: Iterable[str] = ()) -> list[Variant]:
    """All variants, in the order of the recipes and, within one, of the values."""
    keys: dict[str, list[str]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} sets nothing; write section.key=value or section.key=a,b")
        if key in SEEDED:
            raise ValueError(f"{key} follows from the number of seeds; leave it out")
        if key in keys:
            raise ValueError(f"{key} is set twice; give all of its values at once: {key}=a,b")
        keys[key] = split_values(text)
    variants = []
    for text in recipes:
        model, path, control = _parse(text)
        for values in itertools.product(*keys.values()):
            overrides = dict(zip(keys, values, strict=True))
            recipe = Recipe.load(path, [f"{key}={value}" for key, value in overrides.items()])
            swept = tuple((key, value) for key, value in overrides.items() if len(keys[key]) > 1)
            variants.append(Variant(model, swept, recipe, control))
    return variants


def cells(variants: list[Variant], seeds: int, out: Path) -> list[Cell]:
    """Every run, seed by seed, so that the table has all rows early."""
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; give at least 1, and 3 for an interval that says something")
    folders = [re.sub(r"[^\w.=,+-]+", "-", variant.name) for variant in variants]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(f"two variants are called {folder!r}; name the recipes: one=PATH other=PATH")
    return [
        Cell(variant, seed, out / folder / f"seed-{seed}")
        for seed in range(seeds)
        for variant, folder in zip(variants, folders, strict=True)
    ]


def split_values(text: str) -> list[str]:
    """Split at the commas that stand in no bracket and in no quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any, Any]]:
    """(key.path, old, new) wherever two nested dicts differ."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def _parse(text: str) -> tuple[str, Path, str]:
    name, equals, rest = text.partition("=")
    path, at, control = (rest if equals else text).partition("@")
    if at and control not in CONTROLS:
        raise ValueError(f"there is no control {control!r}; there are {', '.join(CONTROLS)}")
    return name if equals else Path(path).stem + at + control, Path(path), control
