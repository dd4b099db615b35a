"""Recipes of models with concepts: they run, resume, report their compression, and may be split into micro-batches."""

import shutil

import pytest
import torch

from byrote import DLCMForCausalLM
from byrote.data.packing import validation_batches
from byrote.data.prepare import prepare
from byrote.train.checkpoint import checkpoints, latest
from byrote.train.metrics import read_metrics
from byrote.train.run import finish, make_trainer
from byrote.train.trainer import Trainer

DLCM = {"preset": "dlcm-nano", "compression_ratio": 3.0}


@pytest.fixture
def train(corpus, make_recipe, tmp_path):
    def run(name="run", resume=False, model=DLCM, **settings) -> Trainer:
        recipe = make_recipe(model, threads=1, **settings)
        meta = prepare(recipe.data.options, corpus / "prepared")
        trainer = make_trainer(recipe, tmp_path / name, corpus / "prepared", meta, resume)
        finish(recipe, trainer, trainer.train(), corpus / "prepared")
        return trainer

    return run


def test_compression_is_reported(train, tmp_path):
    trainer = train()
    assert isinstance(trainer.model, DLCMForCausalLM)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    assert all(1 <= record["tokens_per_concept"] <= 24 for record in steps)
    last = [record for record in records if "val_loss" in record][-1]
    # Counted once more, from the checkpoint that the run left.
    model = DLCMForCausalLM.from_pretrained(latest(tmp_path / "run")).eval()
    data, read, concepts = trainer.validation.data, 0, 0
    for batch in validation_batches(data, 8, 24):
        with torch.no_grad():
            found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        read, concepts = read + found.boundaries.numel(), concepts + int(found.boundaries.sum())
    assert last["val_tokens_per_concept"] == pytest.approx(read / concepts, abs=1e-3)


def test_logged_loss_is_that_of_the_next_token(train, tmp_path):
    """A weight that dwarfs the language loss must not show in it."""
    losses = []
    for name, weight in (("light", 0.0), ("heavy", 1000.0)):
        train(name, model={**DLCM, "boundary_weight": weight}, steps=1, warmup=0)
        losses.append(read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"])
    # What is taken off again was added in float32.
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_resumed_equals_uninterrupted(train, tmp_path):
    """Boundaries are drawn, so the state of the generator is part of a checkpoint."""
    whole = train("whole", checkpoint_every=4, keep=3)
    first = checkpoints(tmp_path / "whole")[0]
    (tmp_path / "again/checkpoints").mkdir(parents=True)
    for name in ("recipe.json", "metrics.jsonl"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "again" / name)
    shutil.move(first, tmp_path / "again/checkpoints" / first.name)
    again = train("again", resume=True, checkpoint_every=4, keep=3)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


@pytest.mark.parametrize("mode", ["decoupled", "e2e"])
def test_micro_batches_take_the_same_step(train, mode):
    """The loss of the compression depends on the boundaries of the whole step: each part has to know them."""
    settings = {
        "steps": 1,
        "warmup": 0,
        "epsilon": 1e-2,
        "model": {**DLCM, "boundary_mode": mode, "boundary_weight": 3.0},
    }
    whole, parts = (train(f"by-{size}", micro_batch_size=size, **settings) for size in (0, 2))
    for (name, ours), theirs in zip(parts.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_plain_model_trains_too(train, tmp_path):
    train(model={"preset": "dlcm-nano", "num_concept_layers": 0, "num_decoder_layers": 0})
    assert not any("tokens_per_concept" in record for record in read_metrics(tmp_path / "run/metrics.jsonl"))


def test_a_key_of_the_other_family_is_refused(make_recipe):
    with pytest.raises(ValueError, match=r"unknown key model.n_group"):
        make_recipe({"preset": "dlcm-nano", "n_group": 2})
    with pytest.raises(ValueError, match=r"unknown key model.compression_ratio"):
        make_recipe({"preset": "nano", "compression_ratio": 2.0})
    with pytest.raises(ValueError, match=r"model.preset must be one of \['dense-4b'.*'dlcm-tiny'"):
        make_recipe({"preset": "dlcm-tinny"})
