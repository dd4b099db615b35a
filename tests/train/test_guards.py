"""Each guard speaks once of a sick table, and none of a healthy one."""

import warnings

import pytest
import torch

from byrote.models.engram import EngramForCausalLM
from byrote.train.guards import TableWarning
from byrote.train.optimizer import Optimizer
from tests.train.test_optimizer import make

LENGTH = 16
PATIENCE = 30


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("byrote.train.guards.PATIENCE", PATIENCE)


def train(model: EngramForCausalLM, steps: int, spoil=None) -> list[str]:
    """The guards' warnings over `steps` steps on random ids; `spoil` acts after each backward."""
    optimizer = Optimizer(model.train(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            ids = torch.randint(3, model.config.vocab_size, (2, LENGTH), generator=generator)
            model(input_ids=ids, labels=ids).loss.backward()
            if spoil:
                spoil(model)
            optimizer.step()
            optimizer.zero_grad()
    return [str(warning.message) for warning in caught if warning.category is TableWarning]


def memories(model):
    return [memory for _, memory in model.memory_stack.items()]


def test_a_healthy_training_is_silent():
    assert train(make(), 2 * PATIENCE + 20) == []


def test_a_table_without_updates():
    def drop(model):
        memories(model)[0].lookup.pending.drop()

    assert train(make(), PATIENCE - 1, drop) == []
    [text] = train(make(), 2 * PATIENCE + 20, drop)
    layer = make().memory_stack.items()[0][0]
    assert f"layer {layer} got no update in {PATIENCE} steps" in text and "detached" in text


def test_a_frozen_table_in_training_mode():
    model = make()
    memories(model)[-1].anchor.requires_grad_(False)
    [text] = train(model, PATIENCE + 20)
    assert "is frozen while the model is in training mode" in text and "requires_grad_(True)" in text


def test_dead_heads():
    model = make()
    layer, memory = model.memory_stack.items()[0]
    dead = 1
    begin, end = (*model.memory_stack.spec.layer(layer).offsets, memory.table.num_rows)[dead : dead + 2]

    def kill(model):
        pending = memory.lookup.pending
        pending.parts = [
            tuple(column[keep] for column in part)
            for part in pending.parts
            for keep in [(part[0] < begin) | (part[0] >= end)]
        ]

    [text] = train(model, 2 * PATIENCE, kill)
    assert f"layer {layer} has heads of which no row moved in {PATIENCE} steps: columns [{dead}]" in text


def test_rows_that_blow_up():
    model = make()
    memory = memories(model)[0]
    everything = torch.arange(memory.table.num_rows)
    steps = iter(range(100))

    def enlarge(model):
        if next(steps) == 15:
            memory.table.write(everything, 1e4 * memory.table.read(everything))

    texts = train(model, 40, enlarge)
    assert len(texts) == 1 and "root mean square" in texts[0] and "row_max_norm" in texts[0]
