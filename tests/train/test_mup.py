"""Decoupled muP: rates, eps and decay of each place, steps against a plain Adam, and what is refused."""

import pytest
import torch

from byrote import DLCMConfig, DLCMForCausalLM, EngramConfig, EngramForCausalLM
from byrote.train.muon import Muon
from byrote.train.mup import MuP
from byrote.train.optimizer import Optimizer
from byrote.train.run import build_optimizer
from tests.lab.two_widths import TwoWidths, make


def test_rates_and_eps_of_each_place():
    """Token width 4 times the base, concept width 8 times; base rates of their own."""
    model = TwoWidths(64, 128, mup=True)
    base = MuP(token=2.0, concept=3.0, others=5.0)
    optimizer = Optimizer(model, 1e-3, eps=1e-6, weight_decay=0.1, mup=base)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    expected = {
        "embedding.weight": (5e-3, 1e-6, 0.0),
        "head.weight": (5e-3, 1e-6, 0.1),
        "encoder.up.weight": (2e-3 / 4, 1e-6 / 4, 0.1),
        "encoder.up.bias": (5e-3, 1e-6, 0.0),
        "pool.weight": (2e-3 / 4, 1e-6 / 4, 0.1),
        "trunk.down.weight": (3e-3 / 8, 1e-6 / 8, 0.1),
        "read.weight": (3e-3 / 8, 1e-6 / 8, 0.1),
        "exit.weight": (5e-3, 1e-6, 0.0),
    }
    parameters = dict(model.named_parameters())
    for name, values in expected.items():
        group = found[id(parameters[name])]
        assert (group["lr"], group["eps"], group["weight_decay"]) == pytest.approx(values), name
        assert group["kind"] == "adamw" and group["betas"] == (0.9, 0.95)
    assert [group["mup"] for group in optimizer.param_groups] == [
        *("embedding", "token", "concept"),  # decayed
        *("embedding", "others"),
    ]


def test_steps_are_those_of_adam_with_these_rates():
    """Against torch's AdamW, with a group for each parameter."""
    (model, batches), (twin, _) = (make(32, varied="concept", mup=True) for _ in range(2))
    ours = Optimizer(model, 1e-2, eps=1e-4, weight_decay=0.1, mup=MuP())
    groups = []
    for name, parameter in twin.named_parameters():
        group, s = twin.mup_groups()[name]
        assert s == (2.0 if group == "concept" else 1.0)
        decay = 0.1 if parameter.dim() > 1 and name != "embedding.weight" else 0.0
        groups.append({"params": [parameter], "lr": 1e-2 / s, "eps": 1e-4 / s, "weight_decay": decay})
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(4):
        for net, updates in ((model, ours), (twin, theirs)):
            net(**batches(step)).loss.backward()
            updates.step()
            updates.zero_grad()
    for (name, mine), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5, msg=name)


def test_at_the_base_width_mup_changes_nothing():
    trained = []
    for mup in (None, MuP()):
        model, batches = make(16, varied="both", mup=True)
        optimizer = Optimizer(model, 1e-2, mup=mup)
        for step in range(3):
            model(**batches(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*trained, atol=1e-6, rtol=1e-5)


def dlcm(**overrides):
    return DLCMForCausalLM(DLCMConfig.from_preset("dlcm-nano", vocab_size=64, mup_base_width=32, **overrides))


def test_a_dlcm():
    """Tokens at twice the base, concepts at four times; every parameter lies in one group, anchors in theirs."""
    memory = {"memory_layers": [0], "memory_table_sizes": [31, 61], "vocabulary": torch.arange(64).numpy()}
    model = dlcm(**memory)
    optimizer = Optimizer(model, 1e-3, mup=MuP())
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    for part, rate in {
        "encoder.0.attention.q_proj": 5e-4,
        "concepts.up": 5e-4,
        "boundary.query": 5e-4,
        "read.q_proj": 5e-4,
        "read.o_proj": 5e-4,
        "read.k_proj": 2.5e-4,
        "read.v_proj": 2.5e-4,
        "concepts.layers.1.experts.": 2.5e-4,
        "lm_head": 1e-3,
        "embed_tokens": 1e-3,
        "norm": 1e-3,
        "memory.key.weight": 1e-3,
        "memory.value.weight": 1e-3,
        "memory.key_gain": 1e-3,
        "memory.conv_weight": 1e-3,
        "anchor": 5e-3,
    }.items():
        assert {value for name, value in by_name.items() if part in name} == {rate}, part


def test_what_reads_rows_starts_alike_at_every_width():
    """A memory's matrices as embeddings do, while those that read tokens start smaller by the root of the width."""
    memory = {"memory_layers": [0], "memory_table_sizes": [31, 61], "vocabulary": torch.arange(64).numpy()}
    widths = {"hidden_size": 512, "num_attention_heads": 32, "num_key_value_heads": 16}
    encoder = dlcm(**memory, **widths).model.encoder[0]
    for matrix, std in (
        (encoder.memory.key, 0.02),
        (encoder.memory.value, 0.02),
        (encoder.attention.q_proj, 0.02 / 4),
    ):
        assert matrix.weight.std().item() == pytest.approx(std, rel=0.05)


def test_state_is_of_the_same_places():
    model = dlcm()
    saved = Optimizer(model, mup=MuP()).state_dict()
    Optimizer(model, mup=MuP()).load_state_dict(saved)
    Optimizer(model).load_state_dict(saved)  # the config names a base width
    with pytest.raises(ValueError, match="with the same `muon` and `mup`"):
        Optimizer(model, mup=None).load_state_dict(saved)


def test_what_is_refused():
    with pytest.raises(ValueError, match="EngramForCausalLM has no mup_groups"):
        Optimizer(EngramForCausalLM(EngramConfig.from_preset("nano", memory_layers=[])), mup=MuP())
    with pytest.raises(ValueError, match="Muon's follow another rule"):
        Optimizer(dlcm(), mup=MuP(), muon=Muon())
    with pytest.raises(ValueError, match="token is -1"):
        MuP(token=-1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, "head.weight is not in mup_groups"),
        ({"tail.weight": ("token", 1.0)}, "tail.weight of mup_groups.. is no parameter"),
        ({"head.weight": ("head", 1.0)}, "in group 'head'; there are embedding, token, concept, others"),
        ({"head.weight": ("token", 0.0)}, "head.weight has s=0.0"),
    ],
)
def test_places_that_cannot_be(change, message):
    model = TwoWidths(16, 16, mup=True)
    places = {name: place for name, place in {**model.mup_groups(), **change}.items() if place}
    model.mup_groups = lambda: places
    with pytest.raises(ValueError, match=message):
        Optimizer(model, mup=MuP())


def test_a_recipe_with_a_base_width_has_the_rates_too(make_recipe):
    """Half of muP, the init and the logits without the rates, would be worse than none."""
    for base in (None, 32):
        recipe = make_recipe({"preset": "dlcm-nano", "mup_base_width": base} if base else {"preset": "dlcm-nano"})
        model = DLCMForCausalLM(DLCMConfig.from_preset(recipe.model.preset, **recipe.model.overrides))
        groups = build_optimizer(recipe, model).param_groups
        rates = {group.get("mup"): group["lr"] / recipe.train.learning_rate for group in groups}
        assert rates == pytest.approx(
            {"embedding": 1, "token": 1 / 2, "concept": 1 / 4, "others": 1} if base else {None: 1}
        )
