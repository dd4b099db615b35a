"""Coefficients that are known, found again: without noise, with noise, with outliers; and what cannot be found.

Coefficients are made up. The grid is that of the paper's runs: P 30, 50, 70 %, R 2, 4, 8, three sizes.
"""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from byrote.lab.studies.dlcm_scaling.data import Decays, Runs
from byrote.lab.studies.dlcm_scaling.decay import fit_decay
from byrote.lab.studies.dlcm_scaling.fit import NAMES, _Problem, fit_law
from byrote.lab.studies.dlcm_scaling.law import Decay
from tests.lab.test_scaling_law import LAW, changed


def grid(law=LAW, *, noise=0.0, outliers=0.0, sizes=(274e6, 468e6, 833e6), lengths=6, seed=0):
    """(runs, the losses without noise)"""
    points = itertools.product(sizes, (2, 4, 8), (0.3, 0.5, 0.7), np.geomspace(1e9, 2e11, lengths))
    n, r, p, d = np.array(list(points), float).T
    generator, clean = np.random.default_rng(seed), law.loss(n, d, r, p)
    loss = clean * np.exp(noise * generator.standard_normal(len(n)))
    loss[generator.random(len(n)) < outliers] *= 1.1
    return Runs(n, d, r, p, loss), clean


def fit(runs, **options):
    return fit_law(runs, np.random.default_rng(1), **{"starts": 6, "samples": 20, **options})


@pytest.mark.parametrize("law", [LAW, changed(delta_token=0.5, a_token=8e3, gamma=0.5, a_concept=20.0)])
def test_without_noise_every_coefficient_is_recovered(law):
    runs, _ = grid(law)
    found = fit(runs)
    assert np.abs(found.residuals).max() < 1e-6 and found.r2 > 1 - 1e-9
    for name in NAMES:
        assert getattr(found.law, name) == pytest.approx(getattr(law, name), rel=1e-2), name
    assert not found.undetermined and found.agreeing >= 3


@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_with_noise_losses_exponents_and_the_best_share_are_recovered(outliers):
    """Noise of 0.3 %, one run in ten 10 % too high. Three sizes do not determine the token exponent, and it says so."""
    runs, clean = grid(noise=3e-3, outliers=outliers, lengths=8)
    found = fit(runs)
    assert np.abs(found.predicted / clean - 1).max() < 5e-3
    assert found.law.alpha == pytest.approx(LAW.alpha, rel=0.1)
    assert found.law.gamma == pytest.approx(LAW.gamma, rel=0.25)
    assert {"delta_token", "t_token", "a_token"} <= found.undetermined
    assert not {"alpha", "gamma"} & found.undetermined
    for r in (2, 4, 8):
        assert found.law.best_share(3e8, r) == pytest.approx(LAW.best_share(3e8, r), abs=0.03)
        low, high = found.interval(lambda law, r=r: law.best_share(3e8, r))
        assert low < found.law.best_share(3e8, r) < high


def test_sizes_that_spread_and_given_offsets_determine_the_exponents():
    runs, _ = grid(noise=1e-3, sizes=(3e7, 1e8, 3e8, 1e9, 3e9))
    offsets = {name: getattr(LAW, name) for name in ("t_token", "t_concept", "t_data")}
    found = fit(runs, fixed=offsets)
    assert not found.undetermined and {name: getattr(found.law, name) for name in offsets} == offsets
    for name in ("delta_token", "delta_concept", "gamma", "alpha"):
        assert getattr(found.law, name) == pytest.approx(getattr(LAW, name), rel=0.15), name
        low, high = found.interval(lambda law, name=name: getattr(law, name))
        assert low < high < 2 * low


def test_robust_is_better_than_squares():
    """Outliers on one side pull the squares; a huge delta is the squares."""
    runs, clean = grid(noise=1e-3, outliers=0.1)
    errors = [np.abs(fit(runs, delta=delta, starts=3, samples=4).predicted / clean - 1).max() for delta in (1e-3, 1e3)]
    assert errors[0] < 3e-3 and 3 * errors[0] < errors[1]


def test_what_no_noise_hides():
    """Two lengths give one difference: any exponent and offset of the data term fit, exactly."""
    found = fit(grid(lengths=2)[0])
    assert np.abs(found.residuals).max() < 1e-5
    assert {"e0", "a_data", "t_data", "alpha"} <= found.undetermined


def test_a_term_that_is_not_there_is_undetermined():
    """Losses without a data term: its size ends at the bound."""
    assert "a_data" in fit(grid(changed(a_data=1e-12))[0]).undetermined


def test_jacobian_and_start():
    runs, _ = grid(noise=1e-2)
    for fixed in ({}, {"e0": 1.5, "t_data": 0.0, "gamma": 0.0}):
        problem = _Problem(runs, fixed)
        _, at = problem.start(np.random.default_rng(3))
        numeric = approx_fprime(at, problem.residuals, 1e-6)
        np.testing.assert_allclose(problem.jacobian(at), numeric, atol=1e-5)
        found = fit(runs, fixed=fixed).law
        assert {name: getattr(found, name) for name in fixed} == fixed


def test_one_seed_one_fit():
    runs, _ = grid(noise=1e-2)
    first, second = (fit(runs, starts=2, samples=4) for _ in range(2))
    assert first.law == second.law and first.samples == second.samples


DECAY = Decay(k=0.02, a=1.5, b=-0.2, c=0.04)


def decays(noise=0.0, count=27, **columns):
    generator = np.random.default_rng(0)
    n, r = generator.uniform(2e8, 8e8, count), generator.choice([2.0, 4.0, 8.0], count)
    stable = generator.uniform(2.5, 3.5, count)
    at = {"n": n, "r": r, "stable": stable, **columns}
    reduction = DECAY.reduction(at["stable"], at["r"], at["n"]) * np.exp(noise * generator.standard_normal(count))
    return Decays(**at, decayed=at["stable"] * (1 - reduction))


def test_decay_is_recovered():
    found = fit_decay(decays())
    assert vars(found.decay) == pytest.approx(vars(DECAY), rel=1e-6) and found.r2 == pytest.approx(1)
    np.testing.assert_allclose(found.predicted, found.observed)


def test_decay_with_noise_lies_in_its_intervals():
    found = fit_decay(decays(noise=0.05))
    for name, (low, high) in found.intervals.items():
        assert low < getattr(DECAY, name) < high, name
    assert 0.8 < found.r2 < 1
    # By hand: the slope of R from the normal equations of all four columns.
    runs = found.runs
    design = np.stack([np.ones(27), np.log(runs.stable), np.log(runs.r), np.log(runs.n)], 1)
    assert found.decay.b == pytest.approx(np.linalg.pinv(design)[2] @ np.log(found.observed), abs=1e-9)


def test_decays_that_tell_nothing():
    with pytest.raises(ValueError, match="too few for k, a, b and c"):
        fit_decay(decays(count=4))
    with pytest.raises(ValueError, match="R is 4 in all runs: b cannot be told from k"):
        fit_decay(decays(r=np.full(27, 4.0)))
    with pytest.raises(ValueError, match="move together"):
        fit_decay(decays(stable=3.0 * np.geomspace(1, 1.2, 27), n=1e8 * np.geomspace(1, 1.2, 27)))


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ({"delta": 1.0}, "there is no coefficient 'delta'"),
        ({"a_data": 1.0}, "a_data cannot be fixed"),
        ({"alpha": 0.0}, "give a number above 0"),
        ({"t_data": -1.0}, "give a number from 0"),
        ({"gamma": math.nan}, "gamma is fixed at nan"),
        ({"e0": 9.0}, "the least loss is"),
    ],
)
def test_what_cannot_be_fixed(fixed, message):
    with pytest.raises(ValueError, match=message):
        fit(grid()[0], fixed=fixed)


def test_runs_that_cannot_tell():
    runs, _ = grid()
    few = Runs(*(values[:11] for values in (runs.n, runs.d, runs.r, runs.p, runs.loss)))
    with pytest.raises(ValueError, match="11 runs are too few for 11 coefficients"):
        fit(few)
    with pytest.raises(ValueError, match="all runs have D=1e"):
        fit(Runs(runs.n, np.full_like(runs.d, 1e11), runs.r, runs.p, runs.loss))
    flat = Runs(runs.n, runs.d, np.full_like(runs.r, 4.0), runs.p, runs.loss)
    with pytest.raises(ValueError, match="gamma cannot be told from a_concept"):
        fit(flat)
    fit(flat, fixed={"gamma": 0.0})
    with pytest.raises(ValueError, match="starts is 0"):
        fit(runs, starts=0)
