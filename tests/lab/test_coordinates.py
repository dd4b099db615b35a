"""The coordinate check and the sweep of rates, on a net with two widths; muP holds and its absence shows."""

from functools import partial

import numpy as np
import pytest
import torch

from byrote.lab.studies.mup.coordinates import Coordinates, coordinates, plot_coordinates
from byrote.lab.studies.mup.transfer import Transfer, transfer
from byrote.train.mup import MuP
from byrote.train.optimizer import Optimizer
from tests.lab.two_widths import make

STAGES = {name: name for name in ("encoder", "pool", "trunk", "read", "decoder", "head")}
WIDTHS = (16, 32, 64, 128)


def optimizer(mup, rate=1e-2):
    return lambda model, rate=rate: Optimizer(model, rate, weight_decay=0.0, mup=MuP() if mup else None)


@pytest.mark.parametrize(("varied", "moved"), [("token", "encoder"), ("concept", "trunk")])
def test_flat_with_mup_and_not_without(varied, moved):
    """After 10 steps over widths of 1 to 8; without muP the stage whose width varies is far off."""
    with_, without = (
        coordinates(partial(make, varied=varied, mup=mup), WIDTHS, STAGES, optimizer(mup)) for mup in (True, False)
    )
    for stage in STAGES:
        assert with_.spread(stage) < 2, stage
    assert without.spread(moved) > 8 > 4 > with_.spread(moved)


def test_half_of_mup_is_not_enough():
    """The init alone, with one rate for all widths: the check must see it."""
    check = coordinates(partial(make, varied="token", mup=True), WIDTHS, STAGES, optimizer(False))
    assert check.spread("encoder", step=0) < 1.5 and check.spread("encoder") > 3


def test_what_is_recorded():
    """Step 0 is the net as it was made, step k the one after k steps of the optimizer."""
    check = coordinates(partial(make, varied="both", mup=True), (16, 32), {"first": "encoder.norm"}, optimizer(True), 2)
    assert check.rms.shape == (2, 3, 1) and check.stages == ["first"] and check.widths == [16, 32]
    for row, width in enumerate((16, 32)):
        model, batches = make(width, varied="both", mup=True)
        updates = optimizer(True)(model)
        for step in range(3):
            output = model.encoder.norm(model.embedding(batches(step)["ids"]))
            assert check.rms[row, step, 0] == pytest.approx(output.detach().square().mean().sqrt().item(), rel=1e-5)
            model(**batches(step)).loss.backward()
            updates.step()
            updates.zero_grad()


def test_spread():
    check = Coordinates([1, 2], ["a", "b"], np.array([[[1.0, 0.0]], [[3.0, 1.0]]]))
    assert check.spread("a") == 3.0 and check.spread("b") == float("inf")


def test_pictures(tmp_path):
    check = coordinates(partial(make, varied="token", mup=True), (16, 32), STAGES, optimizer(True), 2)
    plot_coordinates({"one": check, "two": check}, tmp_path / "new/check.png")
    assert (tmp_path / "new/check.png").stat().st_size > 10_000


def test_the_best_rate_moves_without_mup_and_stays_with_it():
    rates = [2.0**-k for k in range(10, 1, -1)]
    found = [
        transfer(partial(make, varied="both", mup=mup), (16, 128), rates, optimizer(mup), 30) for mup in (True, False)
    ]
    assert abs(found[0].shift) <= 1 and found[1].shift <= -2
    assert not found[0].at_an_end and found[0].losses.shape == (2, 9)


def test_of_a_sweep():
    swept = Transfer([64, 16], [0.1, 0.2, 0.4], np.array([[1.0, 2.0, np.inf], [3.0, 2.0, 1.0]]))
    assert swept.best == [0.1, 0.4] and swept.shift == -2 and swept.at_an_end


def test_errors():
    made = partial(make, varied="both", mup=True)
    with pytest.raises(ValueError, match="TwoWidths has no module 'trunks'"):
        coordinates(made, (16,), {"a": "trunks"}, optimizer(True))
    with pytest.raises(ValueError, match="steps is 0"):
        coordinates(made, (16,), STAGES, optimizer(True), 0)
    with pytest.raises(ValueError, match="the rates ascending"):
        transfer(made, (16,), [0.2, 0.1], optimizer(True), 3)

    def explode(width):
        model, batches = made(width)
        with torch.no_grad():
            model.head.weight.fill_(float("nan"))
        return model, batches

    with pytest.raises(ValueError, match="no rate of"):
        transfer(explode, (16,), [0.1], optimizer(True), 3)
