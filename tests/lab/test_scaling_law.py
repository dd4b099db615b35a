"""The law and the best share of concept parameters, against plain loops and brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from byrote.lab.studies.dlcm_scaling.law import MADE_UP as LAW
from byrote.lab.studies.dlcm_scaling.law import Decay, Law, cost_of, size_at


def changed(**values: float) -> Law:
    return Law(**{**vars(LAW), **values})


def test_the_formula_term_by_term():
    n, d, r, p = 5e8, 1e11, 4.0, 0.6
    token, concept = 80 / (2e8 + 1e7) ** 0.28, 60 * 4**0.15 / (3e8 + 3e7) ** 0.25
    assert LAW.loss(n, d, r, p) == pytest.approx(1.6 + token + concept + 400 / (1e11 + 1e9) ** 0.29, rel=1e-12)
    assert LAW.loss([n, n], d, r, [p, 0.3]).shape == (2,)
    assert Decay(k=0.02, a=1.5, b=-0.2, c=0.1).reduction(3.0, 4.0, 1e8) == pytest.approx(
        0.02 * 3**1.5 * 4**-0.2 * 1e8**0.1, rel=1e-12
    )


def test_cost_and_size_are_inverse():
    assert cost_of(1e9, 4.0, 0.6) == pytest.approx(0.4e9 + 0.15e9)
    assert size_at(cost_of(1e9, 4.0, 0.6), 4.0, 0.6) == pytest.approx(1e9)


# What does not change with P is 0: beside it, losses near the best P would be equal in float64.
laws = st.builds(
    changed,
    e0=st.just(0.0),
    a_data=st.just(0.0),
    a_token=st.floats(10, 1e3),
    a_concept=st.floats(10, 1e3),
    delta_token=st.floats(0.05, 1),
    delta_concept=st.floats(0.05, 1),
    gamma=st.floats(0, 1),
    t_token=st.sampled_from([0.0, 1e6, 1e8]),
    t_concept=st.sampled_from([0.0, 1e6, 1e8]),
)


@given(laws, st.floats(1e7, 1e10), st.floats(1, 16))
def test_the_best_share_is_that_of_brute_force(law, cost, r):
    """On a grid of P, then on a finer one around its best."""
    low, high = 0.0, 1.0
    with np.errstate(divide="ignore"):
        for _ in range(4):
            grid = np.linspace(low, high, 2001)
            losses = law.loss(size_at(cost, r, grid), 1e11, r, grid)
            at, step = int(np.argmin(losses)), (high - low) / 2000
            low, high = max(0.0, grid[at] - step), min(1.0, grid[at] + step)
        found = law.best_share(cost, r)
        here = law.loss(size_at(cost, r, found), 1e11, r, found)
    assert here <= losses.min() * (1 + 1e-12)
    # Near the best, losses differ by the square of the distance: brute force sees no more than the root of 1e-16.
    assert found == pytest.approx(grid[at], abs=1e-5)


def test_there_may_be_nothing_to_gain():
    """Offsets larger than the whole model: its own parameters do not matter, the other kind's do."""
    assert changed(t_concept=1e13, t_token=0.0).best_share(1e8, 4.0) == 0.0
    assert changed(t_token=1e13, t_concept=0.0).best_share(1e8, 4.0) == 1.0


def test_symmetric_terms_share_evenly():
    """At R = 1 and equal terms nothing tells the two kinds of parameters apart."""
    law = changed(a_concept=80.0, delta_concept=0.28, t_concept=1e7)
    assert law.best_share(1e9, 1.0) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(("cost", "r", "message"), [(0.0, 4.0, "cost is 0"), (1e8, 0.5, "R is 0.5")])
def test_errors(cost, r, message):
    with pytest.raises(ValueError, match=message):
        LAW.best_share(cost, r)
