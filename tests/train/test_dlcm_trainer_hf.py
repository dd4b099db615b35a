"""The stock transformers Trainer trains and scores a model with concepts."""

import pytest
import torch

from byrote import DLCMConfig, DLCMForCausalLM
from tests.train.test_trainer_hf import losses, trainer


def make() -> DLCMForCausalLM:
    torch.manual_seed(0)
    settings = {"vocab_size": 32, "hidden_size": 32, "head_dim": 8, "concept_size": 48, "boundary_weight": 0.1}
    return DLCMForCausalLM(DLCMConfig.from_preset("dlcm-nano", **settings))


def test_it_trains_and_scores(tmp_path):
    model = make()
    run = trainer(model, tmp_path, callback=False, max_steps=25, lr=1e-2)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    scored = run.predict(run.eval_dataset)
    assert scored.metrics["test_loss"] == pytest.approx(run.evaluate()["eval_loss"])
    assert scored.metrics["test_loss"] < before
    assert scored.predictions[0].shape == (8, 16, 32)


def test_accumulation_weighs_the_rate_once(tmp_path):
    """A step of one batch and the same step in four parts report the same loss, but for what each part's rate is."""
    reported = []
    for parts in (1, 4):
        options = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts, "max_steps": 1}
        model = make()
        model.config.boundary_weight = 100.0
        model.config.boundary_temperature = 1e6  # so sharp that drawing is choosing
        run = trainer(model, tmp_path, callback=False, **options)
        run.train()
        reported.append(losses(run)[0])
    assert reported[1] == pytest.approx(reported[0], rel=0.2)
