"""Recipes: a TOML file -> frozen dataclasses. Unknown keys are errors that name the nearest one.

    [model]  preset, and any field of its config        [data]  what to read       [train]  how to train

`key.path=value` overrides one key, with a TOML value: model.hidden_size=96 data.corpus="prose"
train.steps=200 (a bare word that is no TOML value is taken as a string).
"""

import dataclasses
import difflib
import inspect
import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from byrote.data.prepare import Options

MOST_THREADS = 1024  # with tens of thousands torch ends in a segmentation fault


@dataclass(frozen=True)
class ModelRecipe:
    preset: str = "nano"
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataRecipe:
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

    @property
    def options(self) -> Options:
        return Options(self.corpus, self.vocab_size, self.tokenizer, self.validation, self.text_field, self.clean)


@dataclass(frozen=True)
class TrainRecipe:
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
    max_seconds: float = 0.0  # stop cleanly after so long; 0: off. Where it stops depends on the machine
    prompt: str = ""  # of the sample at the end; the beginning of a validation document unless given
    sample_tokens: int = 80

    def __post_init__(self) -> None:
        at_least = {
            "steps": 1,
            "batch_size": 1,
            "keep": 1,
            "log_every": 1,
            "warmup": 0,
            "micro_batch_size": 0,
        }
        at_least |= {"eval_every": 0, "eval_batches": 0, "checkpoint_every": 0, "read_ahead": 0, "threads": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"train.{name} is {getattr(self, name)}; it must be at least {least}")
        for name, allowed in {
            "optimizer": ("adamw", "muon"),
            "row_rule": ("adam", "adagrad", "sinkhorn"),
            "muon_coefficients": ("hybrid", "jordan"),
            "schedule": ("cosine", "constant", "step", "wsd"),
            "precision": ("float32", "bfloat16"),
            "placement": ("host", "pinned", "device", "file", "sharded"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"train.{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        if self.placement == "sharded" and self.row_rule == "sinkhorn":
            raise ValueError(
                'train.row_rule is "sinkhorn", which balances rows with one another: under train.placement "sharded" '
                'a process has its own rows only; use "adam" or "adagrad"'
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas is {list(self.betas)}; give two numbers from 0 to below 1, as [0.9, 0.95]")
        if self.threads > MOST_THREADS:
            raise ValueError(f"train.threads is {self.threads}; at most {MOST_THREADS} can be started")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"train.decay is {self.decay}; it is a share of the steps, from 0 to 1")
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
        if min(self.mtp_weights) < 0:
            raise ValueError(f"train.mtp_weights is {self.mtp_weights}; a weight is 0 or more")


@dataclass(frozen=True)
class Recipe:
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = ()) -> "Recipe":
        """Read a recipe (.toml, or the recipe.json of a run folder) and apply `key.path=value` overrides."""
        if not path.exists():
            raise ValueError(f"no recipe {path}; the ones that come with byrote are in recipes/")
        try:
            text = path.read_text("utf-8")
            content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a recipe: {error}") from error
        if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
            raise ValueError(f"{path} is not a recipe: it has sections [model], [data] and [train], and nothing beside")
        for override in overrides:
            _apply(content, override)
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Recipe":
        _check(content, ("model", "data", "train"), "")
        for name, section in content.items():
            if not isinstance(section, dict):
                raise ValueError(f"{name} is {section!r}; it is a section: write [{name}] or {name}.KEY=VALUE")
        model = dict(content.get("model", {}))
        _check(model, ("preset", *model_fields(model.get("preset", ModelRecipe.preset))), "model.")
        parts = {name: _section(kind, content.get(name, {}), name) for name, kind in _SECTIONS.items()}
        return cls(ModelRecipe(model.pop("preset", ModelRecipe.preset), model), **parts)

    def to_dict(self) -> dict[str, Any]:
        content = {name: dataclasses.asdict(getattr(self, name)) for name in _SECTIONS}
        return {"model": {"preset": self.model.preset, **self.model.overrides}, **content}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")


_SECTIONS: dict[str, Any] = {"data": DataRecipe, "train": TrainRecipe}


def model_fields(preset: str) -> list[str]:
    """The fields of the preset's config that a recipe may set; those of the vocabulary come from the tokenizer."""
    from byrote.models.families import config_class

    names = list(inspect.signature(config_class(preset)).parameters)
    return [name for name in names if name not in ("kwargs", "vocabulary", "address", "vocab_size")]


def _section(kind: Any, content: dict[str, Any], name: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _check(content, fields, f"{name}.")
    values = {}
    for key, value in content.items():
        default: Any = fields[key].default
        if isinstance(default, tuple) and isinstance(value, list):
            value = tuple(value)
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is tuple and all(type(number) in (int, float) for number in value):
            value = tuple(float(number) for number in value)
        elif type(value) is tuple:
            raise ValueError(f"{name}.{key} is {list(value)}; it must be numbers, like {list(default)}")
        if type(value) is not type(default):
            raise ValueError(f"{name}.{key} is {value!r}; it must be a {type(default).__name__}, like {default!r}")
        values[key] = value
    return kind(**values)


def _check(content: Iterable[str], known: Iterable[str], prefix: str) -> None:
    known = list(known)
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(known)}."
            raise ValueError(f"unknown key {prefix}{key}: {hint}")


def _apply(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *sections, key = path.split(".")
    if not equals or len(sections) != 1:
        raise ValueError(f"{override!r} is no override; write section.key=value, such as train.steps=200")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    content.setdefault(sections[0], {})[key] = value
