"""The three forms of a concept model, trained for a few steps so that nothing is as it was drawn."""

import pytest
import torch

from byrote import DLCMConfig, DLCMForCausalLM
from tests.models.conftest import train

VOCABULARY = 64
MEMORIES = {"memory_layers": [0], "memory_table_sizes": [101, 211], "memory_initializer_range": 0.5}
FORMS = {
    "paper": {},
    "memories": {**MEMORIES, "boundary_convention": "open"},
    "deepseek": {
        **MEMORIES,
        "kv_lora_rank": 16,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_streams": 2,
    },
}


def make(seed=0, vocabulary=None, **overrides) -> DLCMForCausalLM:
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "head_dim": 8, "concept_size": 48, **overrides}
    return DLCMForCausalLM(DLCMConfig.from_preset("dlcm-nano", vocabulary=vocabulary, **settings), vocabulary)


def trained(**overrides) -> DLCMForCausalLM:
    model = make(**overrides)
    torch.manual_seed(1)  # of the boundaries that are drawn
    return train(model)


@pytest.fixture(params=FORMS)
def model(request):
    return trained(**FORMS[request.param])


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(7))
