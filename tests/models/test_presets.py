"""The paper's shapes have the paper's parameter counts (table 5); nothing is allocated."""

import pytest
import torch

from byrote import EngramConfig, EngramForCausalLM
from byrote.models.counts import count
from byrote.models.engram.presets import PRESETS

BILLIONS = {  # total, active, in tables
    "dense-4b": (4.1, 3.8, 0),
    "moe-27b": (26.7, 3.8, 0),
    "engram-27b": (26.7, 3.8, 5.79),
    "engram-40b": (39.5, 3.8, 18.53),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build(preset):
    config = EngramConfig.from_preset(preset)
    with torch.device("meta"):
        model = EngramForCausalLM(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert bool(config.memory_layers) == (preset not in ("dense-4b", "moe-27b"))
    if config.memory_layers:
        assert config.spec.columns * config.memory_row_width == config.memory_size
        assert all(memory.table._rows is None for _, memory in model.model.memories.items())


@pytest.mark.parametrize("preset", BILLIONS)
def test_the_papers_counts(preset):
    total, active, table = BILLIONS[preset]
    counts = count(EngramConfig.from_preset(preset))
    assert counts.total / 1e9 == pytest.approx(total, abs=0.1)
    assert counts.active / 1e9 == pytest.approx(active, abs=0.1)
    assert counts.table / 1e9 == pytest.approx(table, abs=0.005)
