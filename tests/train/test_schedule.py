"""The share of the peak rate, step by step; groups keep their proportions."""

import pytest
import torch

from byrote.train.config import TrainRecipe
from byrote.train.schedule import schedule, share


def test_warmup_then_cosine():
    recipe = TrainRecipe(steps=110, warmup=10, final_rate=0.1)
    assert [share(step, recipe) for step in (0, 9)] == [1 / 11, 10 / 11]
    assert share(10, recipe) == 1.0 and share(60, recipe) == pytest.approx(0.55)
    assert share(110, recipe) == share(500, recipe) == pytest.approx(0.1)


def test_constant():
    recipe = TrainRecipe(steps=110, warmup=0, schedule="constant")
    assert {share(step, recipe) for step in range(120)} == {1.0}


def test_every_group_follows():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 5.0}]
    optimizer = torch.optim.AdamW(groups)
    moving = schedule(optimizer, TrainRecipe(steps=20, warmup=4))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 1.0])
    optimizer.step()
    moving.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 2.0])
