"""Lazy Adam = a torch.optim.Adam of its own for every row, stepped when it is touched; the others = plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.tables import LazyAdam, RamTable, RowAdagrad, SinkhornMomentum, Table
from byrote.tables.rules import CPU

ROWS, WIDTH = 5, 3
touches = st.lists(st.sets(st.integers(0, ROWS - 1)), min_size=1, max_size=12)


def step(table, rule, rows, gradient, rate):
    state = table.read_state(rows, rule.fields(table.width))
    table.write(rows, *rule.update(table.read(rows), state, gradient, rate))


class Plain:
    """A table with no update of its own."""

    device, update = CPU, Table.update

    def __init__(self, table):
        self.width, self.read, self.read_state, self.write = table.width, table.read, table.read_state, table.write


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
    table = RamTable(ROWS, WIDTH, digest="", std=0.1)  # so that float32 rounds far below the tolerance
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


@pytest.mark.parametrize("rule", [LazyAdam(max_norm=1.0), RowAdagrad(max_norm=1.0), SinkhornMomentum()])
def test_the_inputs_stay_as_they_are(rule):
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


@pytest.mark.parametrize("rule", [LazyAdam, RowAdagrad])
@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_max_norm_must_be_positive(rule, max_norm):
    with pytest.raises(ValueError, match="max_norm must be positive"):
        rule(max_norm=max_norm)


@settings(max_examples=40, deadline=None)
@given(pattern=touches, seed=st.integers(0, 2**31), eps=st.sampled_from([1e-8, 1e-2]))
def test_row_adagrad_is_a_scalar_loop(pattern, seed, eps):
    table, rule = RamTable(ROWS, WIDTH, digest="", std=1.0), RowAdagrad(eps=eps)
    twin, sums = table.rows.double().tolist(), [0.0] * ROWS
    for number, touched in enumerate(pattern):
        rows, rate = torch.tensor(sorted(touched), dtype=torch.int64), 0.1 / (1 + number)
        gradient = gradients(seed + number, len(touched))
        step(table, rule, rows, gradient, rate)
        for row, grad in zip(rows.tolist(), gradient.tolist(), strict=True):
            sums[row] += sum(g * g for g in grad) / WIDTH
            twin[row] = [x - rate * g / (math.sqrt(sums[row]) + eps) for x, g in zip(twin[row], grad, strict=True)]
    torch.testing.assert_close(table.rows.double(), torch.tensor(twin, dtype=torch.double), atol=1e-5, rtol=1e-5)


def sinkhorn_twin(weight, momentum, gradient, rate, beta, gamma, iterations, threshold):
    """A whole table as lists of float64, every row of it touched."""
    mixed = []
    for m, g in zip(momentum, gradient, strict=True):
        m[:] = [beta * a + (1 - beta) * b for a, b in zip(m, g, strict=True)]
        mixed.append([beta * a + (1 - beta) * b for a, b in zip(m, g, strict=True)])
    norms = [math.sqrt(sum(u * u for u in row)) for row in mixed]
    for row, norm in zip(mixed, norms, strict=True):
        if norm <= threshold * sum(norms) / len(norms):
            row[:] = [0.0] * len(row)
    for i in range(iterations):
        lines = mixed if i % 2 == 0 else [list(column) for column in zip(*mixed, strict=True)]
        lines = [[u / (math.sqrt(sum(v * v for v in line)) + 1e-20) for u in line] for line in lines]
        mixed = lines if i % 2 == 0 else [list(column) for column in zip(*lines, strict=True)]
    for w, u in zip(weight, mixed, strict=True):
        w[:] = [a - gamma * rate * math.sqrt(len(w)) * b for a, b in zip(w, u, strict=True)]


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 5), seed=st.integers(0, 2**31), iterations=st.sampled_from([1, 3, 11]))
def test_sinkhorn_momentum_is_the_dense_loop(steps, seed, iterations):
    """Every row touched, one of them with next to no gradient, so that it is left out."""
    table, rule = RamTable(ROWS, WIDTH, digest="", std=1.0), SinkhornMomentum(beta=0.8, iterations=iterations)
    weight, momentum = table.rows.double().tolist(), [[0.0] * WIDTH for _ in range(ROWS)]
    for number in range(steps):
        gradient = gradients(seed + number, ROWS)
        gradient[1] *= 1e-5
        step(table, rule, torch.arange(ROWS), gradient, 0.1)
        sinkhorn_twin(weight, momentum, gradient.double().tolist(), 0.1, 0.8, 0.18, iterations, 1e-3)
    torch.testing.assert_close(table.rows.double(), torch.tensor(weight, dtype=torch.double), atol=1e-5, rtol=1e-5)
    assert torch.equal(table.rows[1], RamTable(ROWS, WIDTH, digest="", std=1.0).rows[1])


def test_sinkhorn_moves_all_touched_rows_equally_far_and_no_other():
    table, rule = RamTable(500, 16, digest=""), SinkhornMomentum()
    before, rows = table.rows.clone(), torch.arange(0, 500, 5)
    gradient = torch.randn(100, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 100)[:, None]
    step(table, rule, rows, gradient, 0.1)
    moved = (table.rows - before).norm(dim=1)
    torch.testing.assert_close(moved[rows], torch.full((100,), 0.18 * 0.1 * 4.0), atol=1e-6, rtol=1e-4)
    assert int((moved != 0).sum()) == 100


def test_no_rows_are_no_error():
    for rule in (LazyAdam(), RowAdagrad(), SinkhornMomentum()):
        step(RamTable(ROWS, WIDTH, digest=""), rule, torch.zeros(0, dtype=torch.int64), torch.zeros(0, WIDTH), 0.1)


@pytest.mark.parametrize(
    ("rule", "per_row"), [(LazyAdam(), 8 * 64 + 4), (RowAdagrad(), 4), (SinkhornMomentum(), 4 * 64)]
)
def test_bytes_of_state(rule, per_row):
    """Adam: 8 bytes a parameter and a clock a row; Adagrad: 4 bytes a row. The directory: 4 bytes a row."""
    table = RamTable(4096, 64, digest="")
    step(table, rule, torch.arange(4096), torch.ones(4096, 64), 0.1)
    one = per_row  # entry 0, which a row without state reads
    assert table.stats()["state_bytes"] - 4 * 4096 == 4096 * per_row + one


@pytest.mark.parametrize(("field", "value"), [("beta", 1.0), ("beta", -0.1), ("iterations", 10), ("iterations", 0)])
def test_sinkhorn_refuses(field, value):
    with pytest.raises(ValueError, match=field):
        SinkhornMomentum(**{field: value})


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    "rule",
    [LazyAdam(), LazyAdam(max_norm=0.5, betas=(0.0, 0.5)), RowAdagrad(), RowAdagrad(max_norm=0.5), SinkhornMomentum()],
)
@pytest.mark.parametrize("width", [1, 16, 37])
def test_update_is_the_rule(rule, codec, width):
    """Within rounding of the plain rule, and to the bit the same in place and through `read` and `write`."""
    tables = [RamTable(300, width, digest="", std=1.0, codec=codec) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        rows = torch.randperm(300, generator=generator)[: 60 + number]
        gradient = torch.randn(len(rows), width, generator=generator)
        before = gradient.clone()
        tables[0].update(rule, rows, gradient, 0.1)
        Plain(tables[1]).update(rule, rows, gradient, 0.1)
        assert torch.equal(gradient, before)
        if codec == "fp32":
            step(tables[2], rule, rows, gradient, 0.1)
    everything = torch.arange(300)
    states = [table.read_state(everything, rule.fields(width)) for table in tables]
    assert torch.equal(tables[0].rows, tables[1].rows)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    if codec == "fp32":
        torch.testing.assert_close(tables[0].rows, tables[2].rows, atol=1e-5, rtol=1e-5)
        for name, value in states[2].items():
            torch.testing.assert_close(states[0][name], value, atol=1e-6, rtol=1e-5)


def test_an_update_in_place_is_checked():
    table = RamTable(ROWS, WIDTH, digest="")
    for rows, width in ((torch.tensor([ROWS]), WIDTH), (torch.tensor([0]), WIDTH + 1), (torch.tensor([0, 1]), WIDTH)):
        with pytest.raises(ValueError, match=r"row ids|gradient must be"):
            table.update(LazyAdam(), rows, torch.ones(1, width), 0.1)
    table.update(LazyAdam(), torch.tensor([0]), torch.ones(1, WIDTH), 0.1)
    with pytest.raises(ValueError, match="the table keeps rule state"):
        table.update(RowAdagrad(), torch.tensor([0]), torch.ones(1, WIDTH), 0.1)
    assert table.stats()["rows_touched"] == 1
