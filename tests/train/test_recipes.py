"""Recipes: overrides, and an error for everything that is not a key."""

from pathlib import Path

import pytest

from byrote.train.recipe import Recipe

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
        ("train.steps='3'", "train.steps is '3'; it must be a int"),
        ("train.gradient_checkpointing=1", "must be a bool"),
        ("data.length=1", "data.length is 1; a row needs at least 2"),
        ("train.steps=0", "train.steps is 0; it must be at least 1"),
        ("train.schedule='linear'", "must be one of"),
        ("train.precision='float16'", "must be one of"),
        ("train.optimizer='sgd'", "must be one of ('adamw', 'muon')"),
        ("train.muon_coefficients='v5'", "must be one of ('hybrid', 'jordan')"),
        ("train.decay=1.5", "train.decay is 1.5; it is a share of the steps"),
        ("train.step_at=[0.9, 0.8]", "give ascending shares of the steps"),
        ("train.step_at=[80, 90]", "give ascending shares of the steps"),
        ("train.mtp_weight_at=[0.9, 0.8]", "train.mtp_weight_at is (0.9, 0.8); give ascending shares"),
        ("train.mtp_weights=[0.3]", "train.mtp_weights has 1 entries and train.mtp_weight_at 1"),
        ("train.mtp_weights=[0.3, -0.1]", "a weight is 0 or more"),
        ("train.step_at=[0.5]", "train.step_shares has 2 entries and train.step_at 1"),
    ],
)
def test_errors_name_the_field_and_the_remedy(path, override, message):
    with pytest.raises(ValueError) as error:
        Recipe.load(path, [override])
    assert message in str(error.value)


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ValueError, match="no recipe"):
        Recipe.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(ValueError, match="is not a recipe"):
        Recipe.load(tmp_path / "bad.toml")
    (tmp_path / "flat.toml").write_text("train = 3\n")
    with pytest.raises(ValueError, match="train is 3; it is a section"):
        Recipe.load(tmp_path / "flat.toml")


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_that_come_with_byrote_load(path):
    assert Recipe.load(path).train.steps > 0
