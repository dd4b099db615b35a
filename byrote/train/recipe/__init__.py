"""Recipes: a TOML file -> frozen dataclasses. Unknown keys are errors that name the nearest one.

    [model]  preset, and any field of its config        [data]  what to read       [train]  how to train

`key.path=value` overrides one key, with a TOML value: model.hidden_size=96 data.corpus="prose"
train.steps=200. Python's True, False and None are read too; any other bare word is a string. All fields are checked
when a recipe is read, those of the model against the types that its config declares (byrote.train.recipe.fields).
"""

import dataclasses
import json
import sys
import tomllib
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from byrote.data.prepare import Options
from byrote.tables.placements.open import PLACEMENTS
from byrote.tables.rules import RULES
from byrote.train.recipe.fields import check_names, check_value, parse

RECIPES = Path(__file__).parents[1] / "recipes"

MOST_THREADS = 1024  # with tens of thousands torch ends in a segmentation fault


@dataclass(frozen=True)
class ModelRecipe:
    """The section [model]: a preset and the fields of its config that differ."""

    preset: str = "nano"
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataRecipe:
    """The section [data]: which text, and how it is cut. ValueError names the field that cannot be."""

    corpus: str = "factbook"  # a name of `byrote data`, files:PATTERN or hf:NAME
    folder: str = ""  # where the prepared corpus lies; data/NAME unless given
    vocab_size: int = 8192
    tokenizer: str = ""  # a tokenizer folder to use instead of training one
    validation: float = 0.09  # share of the documents
    text_field: str = "text"
    clean: bool = True  # close up blanks and drop repeated lines of prose; byrote.data.documents says how
    length: int = 256  # tokens in a row

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"data.length is {self.length}; a row needs at least 2 tokens")
        if not self.tokenizer and self.vocab_size < 256 + 3:
            raise ValueError(f"data.vocab_size is {self.vocab_size}; 256 bytes and 3 specials need at least 259")
        _ = self.options  # which has checks of its own

    @property
    def options(self) -> Options:
        return Options(self.corpus, self.vocab_size, self.tokenizer, self.validation, self.text_field, self.clean)


LARGEST = sys.float_info.max
# Of numbers: the least and the most. Torch cannot start more than some thousand threads, and says so by a crash.
RANGES: dict[str, tuple[float, float]] = dict.fromkeys(("steps", "batch_size", "keep", "log_every"), (1, LARGEST))
RANGES |= dict.fromkeys(("micro_batch_size", "warmup", "eval_every", "eval_batches", "checkpoint_every"), (0, LARGEST))
RANGES |= dict.fromkeys(("learning_rate", "row_rate", "muon_rate", "weight_decay", "epsilon", "clip"), (0, LARGEST))
RANGES |= dict.fromkeys(("final_rate", "read_ahead", "max_seconds", "sample_tokens"), (0, LARGEST))
RANGES |= {"decay": (0, 1), "threads": (0, 1024), "seed": (0, 2**63 - 1)}
CHOICES = {
    "optimizer": ("adamw", "muon"),
    "row_rule": tuple(RULES),
    "muon_coefficients": ("hybrid", "jordan"),
    "schedule": ("cosine", "constant", "step", "wsd"),
    "precision": ("float32", "bfloat16"),
    "placement": tuple(PLACEMENTS),
}


@dataclass(frozen=True)
class TrainRecipe:
    """The section [train]: everything about a run but model and text. ValueError names the field that cannot be."""

    steps: int = 1000
    batch_size: int = 16  # rows in one optimizer step, over all processes
    micro_batch_size: int = 0  # rows in one forward; 0: all that a process holds
    optimizer: str = "adamw"  # or "muon": for the hidden matrices, AdamW for the rest
    learning_rate: float = 1e-3
    row_rule: str = "adam"  # of the tables; or "adagrad", "sinkhorn"
    row_rate: float = 5.0  # the tables' rate, as a multiple
    muon_rate: float = 1.0  # the rate of Muon's matrices, as a multiple
    muon_coefficients: str = "hybrid"  # or "jordan": fewer iterations, looser
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8  # of Adam
    clip: float = 1.0  # norm of the dense gradient; 0: off
    schedule: str = "cosine"  # or "constant", "step", "wsd"
    warmup: int = 50  # steps
    final_rate: float = 0.1  # of cosine and wsd, as a share of learning_rate
    step_at: tuple[float, ...] = (0.8, 0.9)  # of step: where the rate falls, as shares of the steps
    step_shares: tuple[float, ...] = (0.316, 0.1)  # of step: to what, as shares of learning_rate
    mtp_weights: tuple[float, ...] = (0.3, 0.1)  # of the loss of prediction modules, if the model has any
    mtp_weight_at: tuple[float, ...] = (0.68,)  # where the weight changes, as shares of the steps
    decay: float = 0.2  # of wsd: the share of the steps, the last ones, in which the rate falls
    precision: str = "float32"  # or "bfloat16": autocast
    gradient_checkpointing: bool = False
    # Of the tables: RAM; "pinned": RAM that a GPU reads by itself; "device": beside the dense part; "file": changed
    # rows in RUN/tables, to which checkpoints point; "sharded": over the processes
    placement: str = "host"
    seed: int = 0
    eval_every: int = 200  # steps; 0: at the end only
    eval_batches: int = 0  # of an evaluation on the way; 0: all. The last evaluation is of all
    log_every: int = 10
    checkpoint_every: int = 500  # steps; 0: at the end only
    keep: int = 2  # checkpoints
    read_ahead: int = 4  # batches
    device: str = "auto"  # or "cpu", "cuda": what the dense part runs on; auto takes a GPU that is there
    threads: int = 0  # of torch; 0: as it is
    max_seconds: float = 0.0  # of training in this call: then stop cleanly; 0: off. Where depends on the machine
    prompt: str = ""  # of the sample at the end; the beginning of a validation document unless given
    sample_tokens: int = 80  # 0: the prompt alone

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:  # nor is NaN
                bound = f"from {least} to {most}" if most < LARGEST else f"at least {least}, and finite"
                raise ValueError(f"train.{name} is {value}; it must be {bound}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"train.{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas is {self.betas}; each is at least 0 and below 1, such as [0.9, 0.95]")
        if self.epsilon <= 0:
            raise ValueError(f"train.epsilon is {self.epsilon}; it must be above 0, such as 1e-8")
        if self.placement == "sharded" and not RULES[self.row_rule].alone:
            raise ValueError(
                'train.row_rule is "sinkhorn", which balances rows with one another: under train.placement "sharded" '
                'a process has its own rows only; use "adam" or "adagrad"'
            )
        for name, example in {"step_at": "[0.8, 0.9]", "mtp_weight_at": "[0.68]"}.items():
            shares = getattr(self, name)
            if list(shares) != sorted(shares) or not all(0 <= at <= 1 for at in shares):
                raise ValueError(f"train.{name} is {shares}; give ascending shares of the steps, such as {example}")
        if len(self.step_shares) != len(self.step_at):
            raise ValueError(
                f"train.step_shares has {len(self.step_shares)} entries and train.step_at {len(self.step_at)}; "
                "give a share of the rate for each place where it falls"
            )
        if len(self.mtp_weights) != len(self.mtp_weight_at) + 1:
            raise ValueError(
                f"train.mtp_weights has {len(self.mtp_weights)} entries and train.mtp_weight_at "
                f"{len(self.mtp_weight_at)}; give a weight to begin with and one for each place where it changes"
            )
        for name in ("mtp_weights", "step_shares"):
            if not all(0 <= weight < LARGEST for weight in getattr(self, name)):
                raise ValueError(f"train.{name} is {getattr(self, name)}; each is 0 or more, and finite")


@dataclass(frozen=True)
class Recipe:
    """A run as data: three sections, read from TOML or from a run folder, with overrides. Unknown keys are errors."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = ()) -> "Recipe":
        """Read a recipe (.toml, or the recipe.json of a run folder) and apply `key.path=value` overrides.

        Where there is no such file, `path` may be the name of a recipe that comes with byrote: nano, controls/bigram.
        """
        content = _read(path)
        for override in overrides:
            _apply(content, override)
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Recipe":
        _check_sections(content)
        parts = {name: _section(kind, content.get(name, {}), name) for name, kind in _SECTIONS.items()}
        return cls(_model(content.get("model", {})), **parts)

    def to_dict(self) -> dict[str, Any]:
        content = {name: dataclasses.asdict(getattr(self, name)) for name in _SECTIONS}
        return {"model": {"preset": self.model.preset, **self.model.overrides}, **content}

    def save(self, path: Path) -> None:
        path.write_text(self.to_json(), "utf-8")

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


_SECTIONS: dict[str, Any] = {"data": DataRecipe, "train": TrainRecipe}


def model_fields(preset: str) -> dict[str, Any]:
    """Fields of the preset's config that a recipe may set, and their types; those of the vocabulary follow from the
    tokenizer.
    """
    from byrote.models.families import config_class

    fields = config_class(preset).own_fields()
    return {name: kind for name, kind in fields.items() if name not in ("address", "vocab_size")}


def _model(content: dict[str, Any]) -> ModelRecipe:
    overrides = {**content}
    preset = overrides.pop("preset", ModelRecipe.preset)
    check_value("model.preset", preset, str)
    if "vocab_size" in overrides:
        raise ValueError("model.vocab_size follows from the tokenizer: set data.vocab_size, or data.tokenizer")
    fields = model_fields(preset)
    check_names(overrides, ("preset", *fields), "model.")
    for key, value in overrides.items():
        check_value(f"model.{key}", value, fields[key])
    return ModelRecipe(preset, overrides)


def _section(kind: Any, content: dict[str, Any], name: str) -> Any:
    fields, wanted = {f.name: f for f in dataclasses.fields(kind)}, typing.get_type_hints(kind)
    check_names(content, fields, f"{name}.")
    values = {}
    for key, value in content.items():
        default = fields[key].default
        check_value(f"{name}.{key}", value, wanted[key], f", like {default!r}")
        kinds = {tuple: tuple, float: float}  # TOML has lists, and whole numbers without a point
        values[key] = kinds.get(type(default), lambda same: same)(value)
    return kind(**values)


def _read(path: Path) -> dict[str, Any]:
    known = {named.relative_to(RECIPES).with_suffix("").as_posix(): named for named in sorted(RECIPES.rglob("*.toml"))}
    file = path if path.is_file() else known.get(path.as_posix(), path)
    if not file.is_file():
        raise ValueError(
            f"no recipe {path}: give a file, or the name of one that comes with byrote: {', '.join(known)}"
        )
    try:
        text = file.read_text("utf-8")
        content = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a recipe: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a recipe: it has sections [model], [data] and [train], and nothing beside")
    try:
        _check_sections(content)
    except ValueError as error:
        raise ValueError(f"{file} is not a recipe: {error}") from None
    return content


def _check_sections(content: dict[str, Any]) -> None:
    check_names(content, ("model", "data", "train"), "")
    for name, section in content.items():
        if not isinstance(section, dict):
            raise ValueError(f"{name} is {section!r}; it is a section: write [{name}] or {name}.KEY=VALUE")


def _apply(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *sections, key = path.split(".")
    if not equals or len(sections) != 1:
        raise ValueError(f"{override!r} is no override; write section.key=value, such as train.steps=200")
    content.setdefault(sections[0], {})[key] = parse(text)
