"""Row gradients share the fate of all gradients, and rows move under any optimizer as under its own rule."""

import copy
import warnings

import pytest
import torch
from torch import nn

from byrote.memory import Memory, TableWarning
from byrote.tables import RamTable
from byrote.train.optimizer import Optimizer

ROWS, WIDTH = 23, 4


class Model(nn.Module):
    """The rows of some ids, projected: a table, and a dense parameter beside it."""

    def __init__(self, seed=0):
        super().__init__()
        self.memory = Memory(RamTable(ROWS, WIDTH, digest="", std=1.0, seed=seed))
        torch.manual_seed(seed)
        self.head = nn.Linear(3 * WIDTH, 1)

    def forward(self, rows):
        return self.head(self.memory.ticket(rows).wait()).square().sum()

    @property
    def rows(self):
        return self.memory.table.read(torch.arange(ROWS))

    @property
    def pending(self):
        return self.memory.lookup.pending


class Twin(nn.Module):
    """The same with a dense embedding."""

    def __init__(self, model):
        super().__init__()
        self.rows, self.head = nn.Parameter(model.rows.clone()), copy.deepcopy(model.head)

    def forward(self, rows):
        return self.head(self.rows[rows].flatten(-2)).square().sum()


def ids(seed=0):
    return torch.randint(ROWS, (2, 5, 3), generator=torch.Generator().manual_seed(seed))


EVERY_ROW = torch.arange(ROWS - 2).view(1, -1, 3)

STOCK = {
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.0}),
    "Adam": (torch.optim.Adam, {"lr": torch.tensor(1e-2), "maximize": True}),
    "SGD": (torch.optim.SGD, {"lr": 1e-2}),
    "momentum": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5}),
    "Nesterov": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
}


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", STOCK)
def test_rows_move_as_a_dense_parameter_would(name, closure):
    """Each row on its own clock: here every row is read in every step, so that the clocks agree."""
    model = Model()
    twin, (kind, options) = Twin(model), STOCK[name]
    for each in (model, twin):
        optimizer = kind(each.parameters(), **options)

        def backward(each=each, optimizer=optimizer):
            optimizer.zero_grad()
            loss = each(EVERY_ROW)
            loss.backward()
            return loss

        for _ in range(4):
            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
    torch.testing.assert_close(model.rows, twin.rows.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.head.weight, twin.head.weight)
    assert model.memory.anchor.item() == 0 and int(model.memory.generation) == model.memory.table.generation == 4
    assert not model.pending.parts


def test_a_row_that_is_not_read_stands_still_and_the_anchor_keeps_its_value():
    model = Model()
    optimizer, before = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5), model.rows.clone()
    model(torch.tensor([[[1, 2, 3]]])).backward()
    optimizer.step()
    moved = (model.rows != before).any(1).nonzero().flatten().tolist()
    assert moved == [1, 2, 3] and model.memory.anchor.item() == 0


def test_the_rate_is_that_of_the_anchors_group_and_a_frozen_anchor_has_none():
    moved = []
    for rate in (1e-2, 5e-2, None):
        model = Model()
        model.memory.anchor.requires_grad_(rate is not None)
        groups = [{"params": [model.memory.anchor], "lr": rate or 1.0}, {"params": model.head.parameters()}]
        optimizer, before = torch.optim.AdamW(groups, 1e-2), model.rows.clone()
        model(ids()).backward()
        optimizer.step()
        moved.append((model.rows - before).abs().max().item())
    assert moved == pytest.approx([1e-2, 5e-2, 0.0], rel=1e-4)


def test_an_optimizer_in_the_backward_itself():
    """One for each parameter, which steps as soon as the gradient is there."""
    model = Model()
    twin = Twin(model)
    for each in (model, twin):
        own = {p: torch.optim.SGD([p], 1e-2) for p in each.parameters()}

        def step(parameter, own=own):
            own[parameter].step()
            own[parameter].zero_grad()

        for parameter in each.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        for seed in range(3):
            each(ids(seed)).backward()
    torch.testing.assert_close(model.rows, twin.rows.detach(), atol=1e-6, rtol=1e-5)


def test_a_gradient_scaler():
    """By a power of two, so that nothing is rounded; a step with an overflow is skipped, rows and all."""
    scaled, plain = Model(), Model()
    for model in (scaled, plain):
        optimizer, scaler = torch.optim.SGD(model.parameters(), 1e-2), torch.amp.GradScaler("cpu", 2.0**16)
        for seed in range(3):
            loss = model(ids(seed)) * (float("inf") if seed == 1 else 1.0)
            if model is scaled:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            elif seed != 1:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(scaled.rows, plain.rows) and scaled.memory.table.generation == 2


def test_optimizers_without_a_rate_are_refused_before_anything_moves():
    for kind in (torch.optim.LBFGS, torch.optim.Adadelta):
        model = Model()
        optimizer, before = kind(model.parameters()), copy.deepcopy(model.head.state_dict())

        def closure(model=model):
            loss = model(ids())
            loss.backward()
            return loss

        with pytest.raises(ValueError, match=f"{kind.__name__} cannot move the rows of tables.*freeze the tables"):
            optimizer.step(closure)
        assert all(torch.equal(value, before[name]) for name, value in model.head.state_dict().items())
        model.memory.anchor.requires_grad_(False)
        optimizer.step(closure)


def caught(model, *optimizers, steps=3):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(ids()).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return [str(warning.message) for warning in found if warning.category is TableWarning]


def test_a_table_that_no_optimizer_holds():
    """One warning at the first step; and none where another optimizer holds it, whichever is first."""
    model = Model()
    [text] = caught(model, torch.optim.SGD(model.head.parameters(), 1e-2), steps=1)
    assert f"table of {ROWS} rows has gradients, but no optimizer holds its anchor" in text
    assert caught(model, torch.optim.SGD(model.head.parameters(), 1e-2)) == []
    model = Model()
    dense, rows = torch.optim.SGD(model.head.parameters(), 1e-2), torch.optim.AdamW([model.memory.anchor])
    assert caught(model, dense, rows) == [] and model.memory.table.generation == 3


def test_pending_sums_are_bounded():
    model = Model()
    for seed in range(50):
        model(ids(seed)).backward()
    assert sum(len(rows) for rows, _, _ in model.pending.parts) <= 3 * ROWS
    twin = Twin(Model())
    for seed in range(50):
        twin(ids(seed)).backward()
    rows, gradient = model.pending.take()
    torch.testing.assert_close(gradient, twin.rows.grad[rows], atol=1e-4, rtol=1e-5)


def scale(model, factor):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def to_none(model):
    for parameter in model.parameters():
        parameter.grad = None


OURS = {
    "ours": lambda model: Optimizer(model, 1e-2, weight_decay=0.0),
    "stock": lambda model: torch.optim.SGD(model.parameters(), 1e-2),
}
DROPS = [to_none, lambda model: scale(model, 0), nn.Module.zero_grad, lambda model: model.zero_grad(False)]


@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
@pytest.mark.parametrize("drop", DROPS)
def test_gradients_that_are_dropped(make, drop):
    """Before the step, and between two backwards: what came before is gone, what comes after counts."""
    model, plain = Model(), Model()
    optimizer, other = make(model), make(plain)
    before = model.rows.clone()
    model(ids(0)).backward()
    drop(model)
    optimizer.step()
    assert torch.equal(model.rows, before)
    model(ids(0)).backward()
    drop(model)
    model(ids(1)).backward()
    optimizer.step()
    plain(ids(1)).backward()
    other.step()
    assert torch.equal(model.rows, plain.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_that_are_scaled(dtype):
    """Between two backwards and before the step; also in steps, and by a factor below zero."""
    model = Model()
    model.memory.to(dtype)
    twin = Twin(model)
    for each in (model, twin):
        each(ids(0)).backward()
        scale(each, 0.25)
        each(ids(1)).backward()
        each(ids(2)).backward()
        scale(each, -2.0)
        scale(each, 2.0**-10)
    model.pending.follow(model.memory.anchor)
    rows, gradient = model.pending.take()
    torch.testing.assert_close(gradient, twin.rows.grad[rows], atol=1e-6, rtol=1e-5)


def test_a_clip_scales_rows_and_counts_them_not():
    model = Model()
    model(ids()).backward()
    before, dense = model.pending.sum()[1].clone(), model.head.weight.grad.clone()
    wanted = nn.utils.get_total_norm([p.grad for p in model.head.parameters()])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert torch.equal(norm, wanted)
    model.pending.follow(model.memory.anchor)
    torch.testing.assert_close(
        model.pending.sum()[1] / before, (model.head.weight.grad / dense).flatten()[0].expand_as(before)
    )


@pytest.mark.parametrize("inputs", ["all", "head"])
def test_a_probe_leaves_nothing(inputs):
    """Between backward and step, and alone."""
    model, plain = Model(), Model()
    asked = list((model if inputs == "all" else model.head).parameters())
    torch.autograd.grad(model(ids(5)), asked)
    assert model.pending.take() is None
    for each in (model, plain):
        optimizer = Optimizer(each, 1e-2)
        each(ids(0)).backward()
        if each is model:
            torch.autograd.grad(model(ids(5)), asked)
            model(ids(6)).backward(inputs=list(model.head.parameters()))
        optimizer.step()
    assert torch.equal(model.rows, plain.rows)


def test_two_forwards_before_one_backward():
    model, twin = Model(), Twin(Model())
    for each in (model, twin):
        (each(ids(0)) + 2 * each(ids(1))).backward()
    rows, gradient = model.pending.take()
    torch.testing.assert_close(gradient, twin.rows.grad[rows], atol=1e-5, rtol=1e-5)


def test_what_is_not_finite_is_seen_in_the_norm_and_refused_until_it_is_zeroed():
    model = Model()
    optimizer, before = torch.optim.SGD(model.parameters(), 1e-2), model.rows.clone()
    values = model.memory.ticket(ids()).wait()
    (values * float("inf")).sum().backward()  # the rows' gradient alone
    assert not nn.utils.get_total_norm([model.memory.anchor.grad]).isfinite()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="row gradients are not finite; nothing was changed"):
            optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(model.rows, before)


def test_what_is_no_factor_is_refused():
    model = Model()
    optimizer = Optimizer(model)
    model(ids()).backward()
    model.memory.anchor.grad.add_(1e-3)
    with pytest.raises(RuntimeError, match=r"something other than a factor.*anchor out of it"):
        optimizer.step()
