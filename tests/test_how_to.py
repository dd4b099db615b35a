"""What docs/architecture.md says of how to add a contract, a rule, a codec and a placement is true: its blocks run."""

import re
from pathlib import Path

import pytest
import torch

from byrote import EngramConfig, EngramForCausalLM
from byrote.address import CONTRACTS
from byrote.tables.codecs import CODECS
from byrote.tables.placements.open import PLACEMENTS
from byrote.tables.rules import RULES
from byrote.train import Optimizer

PAGE = (Path(__file__).parents[1] / "docs/architecture.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.partition("## How to add")[2], re.S)
IDS = torch.tensor([[3, 4, 5, 6, 3, 4]])


@pytest.fixture
def added(monkeypatch):
    """Run the block that adds to a dict; what it adds is gone after the test."""

    def run(dictionary, name):
        before = dict(dictionary)
        [block] = [block for block in BLOCKS if f'["{name}"]' in block]
        exec(block, {"__name__": "docs"})
        assert dictionary.keys() - before.keys() == {name}
        added = dictionary[name]
        dictionary.clear()
        dictionary.update(before)
        monkeypatch.setitem(dictionary, name, added)
        return added

    return run


def model(**fields):
    torch.manual_seed(0)
    return EngramForCausalLM(EngramConfig(memory_layers=[1], memory_initializer_range=1.0, **fields)).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_every_block_is_tried():
    assert len(BLOCKS) == 4


def test_an_address_contract(added, tmp_path):
    added(CONTRACTS, "doubled")
    made = model(memory_contract="doubled")
    assert made.config.spec.contract == "doubled"
    assert made.config.spec.layers[0].rows > 1.9 * model().config.spec.layers[0].rows
    made.save_pretrained(tmp_path)
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path)), logits(made))


def test_a_row_rule(added):
    added(RULES, "sign")
    made = model().train()
    table = made.memory_stack.items()[0][1].table
    everything = torch.arange(table.num_rows)
    before, optimizer = table.read(everything), Optimizer(made, lr=1e-3, row_rate=2.0, row_rule="sign")
    made(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = (table.read(everything) - before).abs()
    assert optimizer.rows_touched > 0
    assert ((moved == 0) | ((moved - 2e-3).abs() < 1e-6)).all()


def test_a_codec(added, tmp_path):
    codec = added(CODECS, "fp16")
    made, exact = model(memory_codec="fp16"), model()
    table, twin = (each.memory_stack.items()[0][1].table for each in (made, exact))
    rows = torch.arange(table.num_rows)
    values = twin.read(rows)
    assert ((table.read(rows) - values).abs().amax(1) <= codec.bound(values)).all()
    made.save_pretrained(tmp_path)
    for placement in ("host", "file"):
        opened = EngramForCausalLM.from_pretrained(tmp_path, placement=placement)
        assert torch.equal(logits(opened.eval()), logits(made))


def test_a_placement(added, tmp_path):
    added(PLACEMENTS, "counting")
    made = model()
    made.save_pretrained(tmp_path)
    opened = EngramForCausalLM.from_pretrained(tmp_path, placement="counting").eval()
    assert torch.equal(logits(opened), logits(made))
    assert opened.memory_stack.items()[0][1].table.reads == 1
