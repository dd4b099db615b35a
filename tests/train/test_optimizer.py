"""The one optimizer: what moves, what does not, and that a refused step changes nothing."""

import pytest
import torch
from torch import nn

from byrote import EngramConfig, EngramForCausalLM
from byrote.nn.engram import Engram
from byrote.nn.router import Router
from byrote.tables import LazyAdam, RowAdagrad, SinkhornMomentum
from byrote.train.muon import Muon
from byrote.train.optimizer import Optimizer


def make(**overrides) -> EngramForCausalLM:
    torch.manual_seed(0)
    settings = {"vocab_size": 32, "memory_layers": [1, 2], "memory_table_sizes": [31, 61], **overrides}
    return EngramForCausalLM(EngramConfig.from_preset("nano", **settings)).train()


def everything(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for layer, memory in model.model.memories.items():
        table = memory.table
        fields = Optimizer(model).rule.fields(table.width)
        state[f"rows.{layer}"] = table.rows.clone()
        rows = torch.arange(table.num_rows)
        state |= {f"{name}.{layer}": value for name, value in table.read_state(rows, fields).items()}
    return state


def some_ids(rows, length, seed=1):
    return torch.randint(3, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_no_trace_in_training(side):
    """Tables so small that what padding reads is also read by tokens, in other steps."""
    results, touched = [], []
    for pad in (0, 5):
        model = make()
        optimizer = Optimizer(model, lr=1e-3, eps=1e-3)
        touched.append([])
        for step in range(4):
            ids = some_ids(3, 6, seed=step)
            padding = (pad, 0) if side == "left" else (0, pad)
            mask = torch.nn.functional.pad(torch.ones_like(ids), padding)
            labels = torch.nn.functional.pad(ids, padding, value=-100)
            if side == "left" and pad:
                labels[:, pad] = -100  # the first token is predicted by nothing, here as there
            model(
                input_ids=torch.nn.functional.pad(ids, padding, value=2), attention_mask=mask, labels=labels
            ).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            touched[-1].append(optimizer.rows_touched)
        results.append(everything(model))
    assert touched[0] == touched[1]
    for name, value in results[0].items():
        if name.endswith("identity"):  # another one, where rows are equal but for rounding
            continue
        torch.testing.assert_close(results[1][name], value, atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_row_gradients_that_are_not_finite_change_nothing():
    """Also when only the second table has one, and the backbone none."""
    model = make()
    optimizer = Optimizer(model)
    ids = some_ids(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    before = everything(model)
    pending = model.model.memories.memories["2"].lookup.pending
    rows, gradient, touched = pending.parts[0]
    pending.parts[0] = (rows, gradient.index_fill(0, torch.tensor([0]), float("nan")), touched)
    for _ in range(2):  # a second step is refused as the first
        with pytest.raises(RuntimeError, match=r"1 of .* row gradients are not finite; nothing was changed"):
            optimizer.step()
        for name, value in everything(model).items():
            assert torch.equal(value, before[name]), name
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()  # and training goes on


def test_a_frozen_router_keeps_its_bias():
    model = make()
    routers = [module for module in model.modules() if isinstance(module, Router)]
    routers[0].weight.requires_grad_(False)
    optimizer = Optimizer(model, router_bias_rate=0.1)
    ids = some_ids(2, 8)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert not routers[0].selection_bias.any() and all(router.selection_bias.any() for router in routers[1:])
    assert optimizer.max_violation > 0


def test_a_step_without_a_backward_moves_no_row():
    model = make()
    optimizer = Optimizer(model)
    optimizer.step()
    assert optimizer.rows_touched == 0
    assert all(memory.table.generation == 0 for _, memory in model.model.memories.items())


def test_what_is_not_given_is_as_the_config_says():
    model = make(router_bias_update_rate=0.25)
    assert Optimizer(model).router_bias_rate == 0.25 and Optimizer(nn.Sequential(model)).router_bias_rate == 0.25
    assert Optimizer(model, router_bias_rate=0.0).router_bias_rate == 0.0
    assert Optimizer(nn.Linear(2, 2)).router_bias_rate == 0.001


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "row_rate", "router_bias_rate", "muon_rate"])
def test_numbers_that_cannot_be_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; give a finite number"):
        Optimizer(nn.Linear(2, 2), **{name: value})


@pytest.mark.parametrize("betas", [(-0.1, 0.9), (0.9,), (0.9, 1.0), (float("nan"), 0.9)])
@pytest.mark.parametrize("rule", ["adam", "adagrad"])
def test_betas_that_cannot_be_are_refused(betas, rule):
    with pytest.raises(ValueError, match=r"betas .*must lie in \[0, 1\)"):
        Optimizer(nn.Linear(2, 2), betas=betas, row_rule=rule)


def test_kinds_and_decay():
    groups = Optimizer(make(), lr=1e-3, row_rate=5.0, weight_decay=0.1).param_groups
    assert [(g["kind"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("adamw", 1e-3, 0.1),
        ("adamw", 1e-3, 0.0),
        ("rows", 5e-3, 0.0),
    ]
    assert {group["kind"] for group in Optimizer(make(memory_layers=[])).param_groups} == {"adamw"}
    assert {tuple(p.shape) for p in groups[2]["params"]} == {(1,)}


@pytest.mark.parametrize("tied", [True, False])
def test_what_muon_moves(tied):
    model = make(tie_word_embeddings=tied)
    optimizer = Optimizer(model, lr=1e-3, weight_decay=0.1, muon=Muon(), muon_rate=2.0)
    kinds = {id(p): (g["kind"], g.get("blocks")) for g in optimizer.param_groups for p in g["params"]}
    by_name = {name: kinds[id(p)] for name, p in model.named_parameters()}
    for name, kind in by_name.items():
        if name.endswith(("gate_up",)):
            assert kind == ("muon", 2), name
        elif name.endswith("anchor"):
            assert kind == ("rows", None), name
        elif any(part in name for part in ("embed_tokens", "lm_head", "norm", "gain", "conv")):
            assert kind == ("adamw", None), name
        else:  # attention, dense and shared experts, down projections, routers, keys and values of the memories
            assert kind == ("muon", 1), name
    assert len(by_name) == len(kinds)
    rates = {(g["kind"], g["weight_decay"]): g["lr"] for g in optimizer.param_groups}
    assert rates == {("muon", 0.1): 2e-3, ("adamw", 0.0): 1e-3, ("rows", 0.0): 5e-3} | (
        {} if tied else {("adamw", 0.1): 1e-3}
    )


def test_the_keys_of_streams_are_matrices_of_their_own():
    layer = Engram(16, 8, num_streams=4)
    groups = Optimizer(layer, muon=Muon()).param_groups
    blocks = {id(p): g["blocks"] for g in groups if g["kind"] == "muon" for p in g["params"]}
    assert blocks == {id(layer.key.weight): 4, id(layer.value.weight): 1}


def test_a_step_of_muon():
    """Each matrix moves by the rule alone, whatever stack it lies in; one that has no gradient stays."""
    model = make()
    optimizer = Optimizer(model, lr=1e-2, weight_decay=0.1, muon=Muon(coefficients="jordan"))
    frozen = model.model.layers[2].attention.o_proj.weight
    names = {id(p): name for name, p in model.named_parameters()}
    ids = some_ids(2, 8)
    momenta = {}
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        frozen.grad = None
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        for group in (g for g in optimizer.param_groups if g["kind"] == "muon"):
            for parameter in group["params"]:
                name = names[id(parameter)]
                if parameter is frozen:
                    assert torch.equal(parameter, before[name])
                    continue
                gradient, value = gradients[name], before[name]
                parts = [m for e in gradient.view(-1, *gradient.shape[-2:]) for m in e.chunk(group["blocks"])]
                values = [m for e in value.view(-1, *value.shape[-2:]) for m in e.chunk(group["blocks"])]
                moved = []
                for i, (part, matrix) in enumerate(zip(parts, values, strict=True)):
                    momentum = momenta.get((name, i), torch.zeros_like(part))
                    direction, momenta[name, i] = optimizer.muon.direction(part, momentum)
                    length = 1e-2 * 0.2 * max(matrix.shape) ** 0.5
                    moved.append(matrix * (1 - 1e-2 * 0.1) - length * direction)
                twin = torch.cat(moved).view_as(parameter)
                torch.testing.assert_close(parameter.detach(), twin, atol=1e-6, rtol=0, msg=name)


def test_state_of_other_kinds_is_refused():
    """The groups may have the same sizes; torch would take over the kinds."""
    saved = Optimizer(make()).state_dict()
    with pytest.raises(ValueError, match="make the optimizer with the same `muon` and `mup`"):
        Optimizer(make(), muon=Muon()).load_state_dict(saved)


def test_rows_are_clipped_row_by_row():
    moved = []
    for max_norm in (None, 1e-6):
        model = make()
        optimizer = Optimizer(model, lr=1e-3, eps=1e-3, row_max_norm=max_norm)
        before = everything(model)
        ids = some_ids(2, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        after = everything(model)
        moved.append({name: (after[name] - before[name]).abs().max() for name in ("rows.1", "rows.2")})
    assert all(moved[1][name] < 0.1 * moved[0][name] for name in moved[0])


@pytest.mark.parametrize(
    ("name", "rule"), [("adam", LazyAdam()), ("adagrad", RowAdagrad()), ("sinkhorn", SinkhornMomentum())]
)
def test_the_row_rule(name, rule):
    """The rows move as the rule moves them, by the state that it keeps with them."""
    model = make()
    optimizer, ids = Optimizer(model, lr=1e-3, row_rule=name), some_ids(2, 8)
    table = model.model.memories.memories["1"].table
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        (rows, gradient, _), everything = optimizer.memories[0].lookup.pending.parts[0], torch.arange(table.num_rows)
        rows, gradient = rows[gradient.any(1)], gradient[gradient.any(1)]
        expected, state = table.read(everything), table.read_state(rows, rule.fields(table.width))
        expected[rows], state = rule.update(expected[rows], state, gradient, 5e-3)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(table.read(everything), expected, atol=1e-6, rtol=1e-5)
        for field, value in table.read_state(rows, rule.fields(table.width)).items():
            torch.testing.assert_close(value, state[field], atol=1e-6, rtol=1e-5)


def test_row_rules_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="row_rule is 'sgd'; it must be one of adam, adagrad, sinkhorn"):
        Optimizer(make(), row_rule="sgd")
    with pytest.raises(ValueError, match="row_max_norm has no effect"):
        Optimizer(make(), row_rule="sinkhorn", row_max_norm=1.0)


def test_a_closure_is_called_with_gradients():
    model = make()
    optimizer = Optimizer(model)
    ids = some_ids(2, 8)

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first and optimizer.rows_touched > 0
