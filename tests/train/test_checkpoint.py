"""Checkpoints of a run folder: found by the number in their names, kept by it, and nothing else is one."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byrote.train.checkpoint import checkpoints, latest, name_of, save_checkpoint, step_of

STEPS = [200, 999_998, 999_999, 1_000_000, 1_000_001, 12_345_678]


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


@pytest.mark.parametrize("keep", [1, 2, 10])
def test_beyond_a_million_steps_the_newest_are_kept_and_found(tmp_path, model, keep):
    for number, step in enumerate(STEPS):
        saved = save_checkpoint(tmp_path, step, model, None, {"step": step}, keep)
        assert saved == latest(tmp_path) and saved.is_dir()
        assert torch.load(saved / "training.pt", weights_only=True) == {"step": step}
        assert names(tmp_path) == [name_of(kept) for kept in STEPS[max(0, number + 1 - keep) : number + 1]]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == set(names(tmp_path))


OTHERS = [
    "step-0best",
    "step-000200 copy",
    "step-000900.bak",
    "step-0000300",
    "step-300",
    "step-",
    "step-000\N{DEVANAGARI DIGIT THREE}00",
]
OTHERS += ["step--00300", ".step-000900.partial", "Step-000900", "best"]


def test_only_the_names_that_training_gives_are_checkpoints(tmp_path, model):
    folder = tmp_path / "checkpoints"
    for name in OTHERS:
        (folder / name).mkdir(parents=True)
        assert step_of(folder / name) is None
    (folder / "step-000800").touch()  # a file
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        latest(tmp_path)
    for step in (100, 200):
        save_checkpoint(tmp_path, step, model, None, {}, keep=1)
    assert names(tmp_path) == ["step-000200"] and step_of(latest(tmp_path)) == 200
    left = {path.name for path in folder.iterdir()}
    assert left == {*OTHERS, "step-000800", "step-000200"} - {".step-000900.partial"}  # of a save that was stopped


def test_the_one_just_written_is_kept_among_later_ones(tmp_path, model):
    for step in (500, 600, 300):
        save_checkpoint(tmp_path, step, model, None, {}, keep=1)
    assert "step-000300" in names(tmp_path)
