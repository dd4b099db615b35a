"""The share of the peak rate, step by step; groups keep their proportions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from byrote.train.muon import Muon
from byrote.train.optimizer import Optimizer
from byrote.train.recipe import TrainRecipe
from byrote.train.schedule import mtp_weight, schedule, share

SCHEDULES = ("constant", "cosine", "step", "wsd")


@st.composite
def recipes(draw, schedules=SCHEDULES):
    steps = draw(st.integers(1, 300))
    return TrainRecipe(
        steps=steps,
        warmup=draw(st.integers(0, steps)),
        schedule=draw(st.sampled_from(schedules)),
        final_rate=draw(st.floats(0, 1)),
        decay=draw(st.floats(0, 1)),
    )


@given(recipes())
def test_up_then_never_up_again(recipe):
    shares = [share(step, recipe) for step in range(recipe.steps + 20)]
    warm, rest = shares[: recipe.warmup], shares[recipe.warmup :]
    assert all(0 < a < 1 for a in warm) and warm == sorted(set(warm))
    assert all(0 <= b <= a <= 1 for a, b in itertools.pairwise(rest))
    # The peak is reached, unless a decay is over before the warmup is.
    if recipe.schedule in ("constant", "cosine", "wsd") and recipe.warmup < recipe.steps and recipe.decay < 1:
        assert shares[recipe.warmup] == pytest.approx(1.0)


@given(recipes(("cosine", "wsd")))
def test_no_jump(recipe):
    """No step changes the rate by more than the steepest slope of the curve."""
    length = recipe.steps - recipe.warmup
    if recipe.schedule == "wsd":
        length = min(length, round(recipe.decay * recipe.steps))
    slope = (1.5708 if recipe.schedule == "cosine" else 1.0) * (1 - recipe.final_rate) / max(1, length)
    shares = [share(step, recipe) for step in range(recipe.steps + 20)]
    for step, (a, b) in enumerate(itertools.pairwise(shares)):
        if length or step >= recipe.steps:  # with nothing to fall over, the fall is one step long
            assert abs(b - a) <= max(slope, 1 / (recipe.warmup + 1)) + 1e-9


@given(recipes())
def test_end_values(recipe):
    ends = {"constant": 1.0, "step": 0.1, "cosine": recipe.final_rate, "wsd": recipe.final_rate}
    for step in (recipe.steps, recipe.steps + 1, 10 * recipe.steps):
        assert share(step, recipe) == pytest.approx(ends[recipe.schedule])


def test_warmup_then_cosine():
    recipe = TrainRecipe(steps=110, warmup=10, final_rate=0.1)
    assert [share(step, recipe) for step in (0, 9)] == [1 / 11, 10 / 11]
    assert share(10, recipe) == 1.0 and share(60, recipe) == pytest.approx(0.55)
    assert share(110, recipe) == share(500, recipe) == pytest.approx(0.1)


def test_constant():
    recipe = TrainRecipe(steps=110, warmup=0, schedule="constant")
    assert {share(step, recipe) for step in range(120)} == {1.0}


@pytest.mark.parametrize("steps", [10, 110, 1000])
def test_step_decay(steps):
    """Exactly at 80 % and 90 % of the steps, also where 0.8 times the steps is no whole number in floating point."""
    recipe = TrainRecipe(steps=steps, warmup=0, schedule="step")
    shares = [share(step, recipe) for step in range(steps)]
    assert shares == [1.0] * (steps * 8 // 10) + [0.316] * (steps // 10) + [0.1] * (steps // 10)
    other = TrainRecipe(steps=steps, warmup=3, schedule="step", step_at=(0.6, 0.9), step_shares=(0.5, 0.2))
    assert share(steps * 6 // 10 - 1, other) == 1.0 and share(steps * 6 // 10, other) == 0.5
    assert share(steps - 1, other) == 0.2


def test_wsd():
    recipe = TrainRecipe(steps=100, warmup=10, schedule="wsd", final_rate=0.0, decay=0.2)
    assert {share(step, recipe) for step in range(10, 81)} == {1.0}
    assert share(90, recipe) == pytest.approx(0.5) and share(99, recipe) == pytest.approx(0.05)
    assert share(100, recipe) == 0.0
    longer = TrainRecipe(steps=100, warmup=10, schedule="wsd", final_rate=0.0, decay=0.4)
    assert share(80, longer) == pytest.approx(0.5)


def test_every_group_follows():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 5.0}]
    optimizer = torch.optim.AdamW(groups)
    moving = schedule(optimizer, TrainRecipe(steps=20, warmup=4))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 1.0])
    optimizer.step()
    moving.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 2.0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_kind_follows(name):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    optimizer = Optimizer(model, lr=1.0, muon=Muon(), muon_rate=3.0)
    recipe = TrainRecipe(steps=10, warmup=2, schedule=name)
    moving = schedule(optimizer, recipe)
    for step in range(12):
        rates = {group["kind"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({"adamw": share(step, recipe), "muon": 3 * share(step, recipe)})
        optimizer.step()
        moving.step()


def test_the_weight_of_the_prediction_modules():
    recipe = TrainRecipe(steps=100, mtp_weights=(0.3, 0.2, 0.0), mtp_weight_at=(0.5, 0.9))
    assert [mtp_weight(step, recipe) for step in (0, 49, 50, 89, 90, 99)] == [0.3, 0.3, 0.2, 0.2, 0.0, 0.0]
    assert [mtp_weight(step, TrainRecipe(steps=100)) for step in (67, 68)] == [0.3, 0.1]
