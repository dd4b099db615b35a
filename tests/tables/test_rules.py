"""Lazy Adam = a torch.optim.Adam of its own for every row, stepped when the row is touched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.tables import LazyAdam, RamTable

ROWS, WIDTH = 5, 3
touches = st.lists(st.sets(st.integers(0, ROWS - 1)), min_size=1, max_size=12)


def step(table, rule, rows, gradient, rate):
    state = table.read_state(rows, rule.fields(table.width))
    table.write(rows, *rule.update(table.read(rows), state, gradient, rate))


def gradients(seed, count):
    return 3 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    pattern=touches,
    seed=st.integers(0, 2**31),
    betas=st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.0, 0.5), (0.5, 0.0)]),
    eps=st.sampled_from([1e-8, 1e-2]),
)
def test_each_row_is_an_adam_of_its_own(pattern, seed, betas, eps):
    table = RamTable(ROWS, WIDTH, digest="", std=1.0)
    rule = LazyAdam(betas=betas, eps=eps)
    weights = [row.clone().requires_grad_() for row in table.rows]
    adams = [torch.optim.Adam([weight], betas=betas, eps=eps) for weight in weights]
    for number, touched in enumerate(pattern):
        rows, rate = torch.tensor(sorted(touched), dtype=torch.int64), 0.1 / (1 + number)
        gradient = gradients(seed + number, len(touched))
        step(table, rule, rows, gradient, rate)
        for row, grad in zip(rows.tolist(), gradient, strict=True):
            adams[row].param_groups[0]["lr"] = rate
            weights[row].grad = grad
            adams[row].step()
    torch.testing.assert_close(table.rows, torch.stack([w.detach() for w in weights]), atol=1e-6, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(pattern=touches, seed=st.integers(0, 2**31), max_norm=st.floats(0.1, 20))
def test_max_norm_bounds_each_row(pattern, seed, max_norm):
    bounded, twin = (RamTable(ROWS, WIDTH, digest="") for _ in range(2))
    for number, touched in enumerate(pattern):
        rows, gradient = (
            torch.tensor(sorted(touched), dtype=torch.int64),
            gradients(seed + number, len(touched)),
        )
        clipped = [g if g.norm() <= max_norm else g * (max_norm / g.norm()) for g in gradient]
        step(bounded, LazyAdam(max_norm=max_norm), rows, gradient, 0.1)
        step(twin, LazyAdam(), rows, torch.stack(clipped) if clipped else gradient, 0.1)
    torch.testing.assert_close(bounded.rows, twin.rows, atol=1e-5, rtol=1e-5)


def test_a_row_first_met_late_moves_by_the_rate():
    table, rule, rate = RamTable(ROWS, WIDTH, digest=""), LazyAdam(), 0.01
    for seed in range(50):
        step(table, rule, torch.tensor([0]), gradients(seed, 1), rate)
    before, gradient = table.read(torch.tensor([1])), gradients(99, 1)
    step(table, rule, torch.tensor([1]), gradient, rate)
    moved = table.read(torch.tensor([1])) - before
    torch.testing.assert_close(moved, -rate * gradient.sign(), atol=1e-6, rtol=0)


def test_the_inputs_stay_as_they_are():
    rule = LazyAdam(max_norm=1.0)
    values, gradient = torch.ones(2, WIDTH), 5 * torch.ones(2, WIDTH)
    state = {name: torch.ones(2, *shape) for name, shape in rule.fields(WIDTH).items()}
    rule.update(values, state, gradient, 0.1)
    assert bool((values == 1).all()) and bool((gradient == 5).all())
    assert all(bool((value == 1).all()) for value in state.values())


def test_many_touches_stay_exact():
    """The touch count is kept in float32; corrections that are 1 stay 1."""
    rule = LazyAdam()
    state = {name: torch.ones(1, *shape) for name, shape in rule.fields(WIDTH).items()} | {
        "touches": torch.tensor([1e6])
    }
    values, state = rule.update(torch.zeros(1, WIDTH), state, torch.ones(1, WIDTH), 0.1)
    torch.testing.assert_close(values, torch.full((1, WIDTH), -0.1), atol=1e-6, rtol=0)
    assert float(state["touches"]) == 1e6 + 1


@pytest.mark.parametrize("betas", [(1.0, 0.95), (-0.1, 0.95), (0.9, 1.0), (0.9, float("nan"))])
def test_betas_outside_of_the_unit_interval_are_refused(betas):
    with pytest.raises(ValueError, match="betas must lie in"):
        LazyAdam(betas=betas)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_max_norm_must_be_positive(max_norm):
    with pytest.raises(ValueError, match="max_norm must be positive"):
        LazyAdam(max_norm=max_norm)
