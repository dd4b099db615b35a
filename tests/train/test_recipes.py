"""Recipes: overrides, types and ranges, and an error for everything that is not a key."""

import tomllib
from pathlib import Path

import pytest

from byrote.models.families import PRESETS, config_class
from byrote.train.recipe import RECIPES, Recipe, TrainRecipe, model_fields
from byrote.train.recipe.fields import fits, parse

RECIPE = """
[model]
preset = "nano"
hidden_size = 64
[data]
corpus = "factbook"
[train]
steps = 10
learning_rate = 1
betas = [0.9, 0.99]
"""


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "r.toml").write_text(RECIPE)
    return tmp_path / "r.toml"


def test_load_override_and_save(path, tmp_path):
    recipe = Recipe.load(path, ["model.hidden_size=96", "train.schedule=constant", "data.corpus='prose'"])
    assert recipe.model.overrides == {"hidden_size": 96} and recipe.model.preset == "nano"
    assert (recipe.train.steps, recipe.train.schedule, recipe.data.corpus) == (10, "constant", "prose")
    assert recipe.train.learning_rate == 1.0 and recipe.train.betas == (0.9, 0.99)
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert Recipe.load(path, ["model.memory_layers=[1, 2]"]).model.overrides["memory_layers"] == [1, 2]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden_size=96", "unknown key model.hiden_size: did you mean model.hidden_size?"),
        ("train.step=3", "unknown key train.step: did you mean train.steps?"),
        ("data.corpsu='x'", "did you mean data.corpus?"),
        ("trian.steps=3", "unknown key trian: did you mean train?"),
        ("data.qqq=1", "unknown key data.qqq: there are corpus, folder"),
        ("steps=3", "is no override; write section.key=value"),
        ("train.steps", "is no override"),
        ("train.steps='3'", "train.steps is '3'; it must be an int"),
        ("train.gradient_checkpointing=1", "must be a bool"),
        ("data.length=1", "data.length is 1; a row needs at least 2"),
        ("train.steps=0", "train.steps is 0; it must be at least 1"),
        ("train.schedule='linear'", "must be one of"),
        ("train.precision='float16'", "must be one of"),
        ("train.optimizer='sgd'", "must be one of ('adamw', 'muon')"),
        ("train.muon_coefficients='v5'", "must be one of ('hybrid', 'jordan')"),
        ("train.decay=1.5", "train.decay is 1.5; it must be from 0 to 1"),
        ("train.step_at=[0.9, 0.8]", "give ascending shares of the steps"),
        ("train.step_at=[80, 90]", "give ascending shares of the steps"),
        ("train.mtp_weight_at=[0.9, 0.8]", "train.mtp_weight_at is (0.9, 0.8); give ascending shares"),
        ("train.mtp_weights=[0.3]", "train.mtp_weights has 1 entries and train.mtp_weight_at 1"),
        ("train.mtp_weights=[0.3, -0.1]", "each is 0 or more, and finite"),
        ("train.step_at=[0.5]", "train.step_shares has 2 entries and train.step_at 1"),
        ("train.step_shares=[0.3, -1]", "train.step_shares is (0.3, -1); each is 0 or more"),
        ("train.betas=[0.9]", "train.betas is [0.9]; it must be a list of 2: a finite number, a finite number"),
        ("train.betas=[0.9, 'x']", "train.betas is [0.9, 'x']; it must be a list of 2"),
        ("train.betas=[0.9, 1]", "each is at least 0 and below 1"),
        ("train.betas=0.9", "train.betas is 0.9; it must be a list of 2"),
        ("train.epsilon=0", "train.epsilon is 0.0; it must be above 0"),
        ("train.learning_rate=-1e-3", "train.learning_rate is -0.001; it must be at least 0"),
        ("train.learning_rate=nan", "train.learning_rate is nan; it must be a finite number"),
        ("train.weight_decay=inf", "train.weight_decay is inf; it must be a finite number"),
        ("train.row_rate=-5", "train.row_rate is -5.0; it must be at least 0"),
        ("train.clip=-1.0", "train.clip is -1.0"),
        ("train.final_rate=-0.1", "train.final_rate is -0.1"),
        ("train.max_seconds=-1", "train.max_seconds is -1.0"),
        ("train.sample_tokens=-1", "train.sample_tokens is -1; it must be at least 0"),
        ("train.threads=100000", "train.threads is 100000; it must be from 0 to 1024"),
        ("train.seed=-1", "train.seed is -1; it must be from 0"),
        ("train.prompt=None", "train.prompt is None; it must be a string"),
        ("train.gradient_checkpointing=yes", "train.gradient_checkpointing is 'yes'; it must be a bool"),
        ("data.validation=1.5", "validation is 1.5"),
        ("data.vocab_size=100", "data.vocab_size is 100; 256 bytes and 3 specials need at least 259"),
        ("model.memory_gate='False'", "model.memory_gate is 'False'; it must be a bool"),
        ("model.memory_gate=0", "model.memory_gate is 0; it must be a bool"),
        ("model.hidden_size=None", "model.hidden_size is None; it must be an int"),
        ("model.hidden_size=64.0", "model.hidden_size is 64.0; it must be an int"),
        ("model.hidden_size=true", "model.hidden_size is True; it must be an int"),
        ("model.q_lora_rank=x", "model.q_lora_rank is 'x'; it must be an int, or None"),
        ("model.rope_theta=1e", "model.rope_theta is '1e'; it must be a finite number"),
        ("model.mtp_loss_weight=nan", "model.mtp_loss_weight is nan; it must be a finite number"),
        ("model.memory_layers=1", "model.memory_layers is 1; it must be a list, each an int"),
        ("model.memory_layers=[1, true]", "model.memory_layers is [1, True]; it must be a list"),
        ("model.memory_table_sizes=[400.5, 400]", "it must be a list, each an int"),
        ("model.yarn=4", "model.yarn is 4; it must be a table of a finite number by name, or None"),
        ("model.scoring_func=True", "model.scoring_func is True; it must be a string"),
        ("model.preset=3", "model.preset is 3; it must be a string"),
        ("model.memory_layer=[1]", "unknown key model.memory_layer: did you mean model.memory_layers?"),
        ("model.vocab_size=512", "model.vocab_size follows from the tokenizer: set data.vocab_size"),
        ("model.address={}", "unknown key model.address"),
        ("model.vocabulary=[1]", "unknown key model.vocabulary"),
    ],
)
def test_errors_name_the_field_and_the_remedy(path, override, message):
    with pytest.raises(ValueError) as error:
        Recipe.load(path, [override])
    assert message in str(error.value)


def test_python_spells_values_too(path):
    words = ["memory_gate=False", "memory_bias=False", "tie_word_embeddings=False", "norm_topk_prob=True"]
    words += [
        "q_lora_rank=None",
        "rope_theta=5000",
        "yarn={factor=4, original_length=64}",
        "memory_layers=[]",
        "memory_kernel_size=0",
    ]
    recipe = Recipe.load(path, [f"model.{word}" for word in words])
    wanted = {"memory_gate": False, "memory_bias": False, "tie_word_embeddings": False, "norm_topk_prob": True}
    wanted |= {"q_lora_rank": None, "rope_theta": 5000, "memory_layers": [], "memory_kernel_size": 0}
    wanted |= {"yarn": {"factor": 4, "original_length": 64}}
    assert recipe.model.overrides == {"hidden_size": 64, **wanted}
    config = config_class("nano").from_preset("nano", **recipe.model.overrides)
    assert (config.memory_gate, config.memory_bias, config.tie_word_embeddings) == (False, False, False)


def test_the_same_in_a_file(tmp_path):
    for line in ("memory_gate = 'False'", "hidden_size = '64'", "memory_layers = [1.0]"):
        (tmp_path / "r.toml").write_text(f"[model]\n{line}\n")
        with pytest.raises(ValueError, match=f"model.{line.split(' ')[0]} is .*; it must be"):
            Recipe.load(tmp_path / "r.toml")


@pytest.mark.parametrize("preset", ["nano", "dlcm-nano", "llama-tiny"])
def test_every_field_of_a_config_has_a_type_that_its_default_fits(preset):
    fields, config = model_fields(preset), config_class(preset).from_preset(preset)
    assert {"hidden_size", "memory_layers", "tie_word_embeddings", "rope_theta", "router_bias_update_rate"} <= set(
        fields
    )
    assert not {"vocab_size", "address", "vocabulary", "presets", "dtype", "kwargs"} & set(fields)
    for name, wanted in fields.items():
        assert fits(getattr(config, name), wanted), name


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_of_the_types(preset):
    shape = {key: value for key, value in PRESETS[preset].items() if key != "vocab_size"}
    assert Recipe.from_dict({"model": {"preset": preset, **shape}}).model.overrides == shape


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("3", 3), ("'3'", "3"), ("true", True), ("True", True), ("None", None), ("none", "none"), ("[1, 2]", [1, 2])],
        *[("files:*.txt", "files:*.txt"), ("1\nx=2", "1\nx=2"), ("", "")],
    ],
)
def test_values_of_overrides(text, value):
    assert parse(text) == value and type(parse(text)) is type(value)


def test_a_recipe_made_in_python_is_checked_too():
    for settings in ({"learning_rate": float("nan")}, {"clip": float("inf")}, {"betas": (0.9, float("nan"))}):
        with pytest.raises(ValueError, match=f"train.{next(iter(settings))} is"):
            TrainRecipe(**settings)


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ValueError, match="no recipe"):
        Recipe.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(ValueError, match="is not a recipe"):
        Recipe.load(tmp_path / "bad.toml")
    (tmp_path / "flat.toml").write_text("train = 3\n")
    with pytest.raises(ValueError, match="train is 3; it is a section"):
        Recipe.load(tmp_path / "flat.toml")
    (tmp_path / "top.toml").write_text("trian = 3\n")
    with pytest.raises(ValueError, match=r"top\.toml is not a recipe: unknown key trian: did you mean train"):
        Recipe.load(tmp_path / "top.toml", ["train.steps=3"])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="it has sections"):
        Recipe.load(tmp_path / "list.json")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"bytes\.toml is not a recipe"):
        Recipe.load(tmp_path / "bytes.toml")
    with pytest.raises(ValueError, match="train is 3; it is a section"):
        Recipe.load(tmp_path / "flat.toml", ["train.steps=3"])


NAMES = [file.relative_to(RECIPES).with_suffix("").as_posix() for file in sorted(RECIPES.rglob("*.toml"))]


@pytest.mark.parametrize("name", NAMES)
def test_the_recipes_that_come_with_byrote_load_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()  # a folder is no recipe
    assert Recipe.load(Path(name)) == Recipe.load(RECIPES / f"{name}.toml")


def test_a_wheel_has_all_of_them():
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["byrote.train"]
    assert {file for pattern in patterns for file in RECIPES.parent.glob(pattern)} == set(RECIPES.rglob("*.toml"))


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").write_text("[train]\nsteps = 7\n")
    assert {"nano", "tiny-engram", "controls/bigram"} <= set(NAMES) and Recipe.load(Path("nano")).train.steps == 7
    with pytest.raises(ValueError, match=r"no recipe tiny-engrm: give a file, or the name .*, tiny-engram,"):
        Recipe.load(Path("tiny-engrm"))
