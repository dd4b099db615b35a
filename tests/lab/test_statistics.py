"""Against tables, values worked out by hand, and integrals."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from byrote.lab.studies.statistics import paired, student_t, summarize

TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 30: 2.042, 100: 1.984}


@pytest.mark.parametrize(("degrees", "t"), TABLE.items())
def test_the_table_of_student(degrees, t):
    assert student_t(degrees) == pytest.approx(t, abs=5e-4)


def test_other_levels():
    assert student_t(5, 0.9) == pytest.approx(2.015, abs=5e-4)
    assert student_t(5, 0.99) == pytest.approx(4.032, abs=5e-4)
    assert student_t(1, 0.5) == pytest.approx(1.0)  # tan(pi / 4)
    assert student_t(2, 0.5) == pytest.approx(math.sqrt(2 / 3))


@given(st.integers(1, 40), st.floats(0.01, 0.99))
def test_probability_is_the_integral_of_the_density(degrees, level):
    t = student_t(degrees, level)
    x = np.linspace(-t, t, 4001)
    scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
    density = scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(level, abs=1e-3)


def test_summary_by_hand():
    """2, 4, 6: mean 4, sd sqrt(8 / 2), half 4.303 * 2 / sqrt(3)."""
    summary = summarize([2.0, 4.0, 6.0])
    assert (summary.n, summary.mean, summary.sd) == (3, 4.0, 2.0)
    assert summary.half == pytest.approx(4.9683, abs=5e-4)
    one = summarize([7.0])
    assert (one.n, one.mean) == (1, 7.0) and math.isnan(one.sd) and math.isnan(one.half)


def test_pairs_are_of_one_seed():
    """Differences 1, 1, 1 of values that spread widely: the seed's share cancels. Seeds that one lacks are left out."""
    difference = paired({0: 11.0, 1: 21.0, 2: 31.0, 3: 5.0}, {2: 30.0, 1: 20.0, 0: 10.0, 4: 9.0})
    assert difference is not None and (difference.n, difference.mean, difference.half) == (3, 1.0, 0.0)
    assert paired({0: 1.0}, {1: 1.0}) is None


numbers = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9)


@given(numbers, st.floats(-100, 100), st.floats(0.1, 10))
def test_intervals_move_and_scale_with_the_values(values, shift, factor):
    before, after = summarize(values), summarize([factor * value + shift for value in values])
    assert after.mean == pytest.approx(factor * before.mean + shift, abs=1e-6)
    assert after.half == pytest.approx(factor * before.half, abs=1e-6)
    assert before.sd == pytest.approx(np.std(values, ddof=1), abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summarize([]), "values is empty"),
        (lambda: student_t(0), "degrees=0"),
        (lambda: student_t(3, 1.0), "level=1.0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
