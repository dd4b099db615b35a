"""Small models with memories that matter."""

import numpy as np
import pytest
import torch

from byrote import EngramConfig, EngramForCausalLM
from byrote.train.optimizer import Optimizer

VOCABULARY = 64


def make(seed=0, vocabulary=None, **overrides) -> EngramForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "memory_layers": [1, 2],
        "memory_initializer_range": 0.5,
        **overrides,
    }
    config = EngramConfig.from_preset("nano", vocabulary=vocabulary, **settings)
    return EngramForCausalLM(config, vocabulary)


def train(model, steps=3, seed=1, lr=3e-3):
    batch = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(seed))
    optimizer = Optimizer(model, lr=lr)
    model.train()
    for _ in range(steps):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def tables(model):
    return [memory.table for _, memory in model.model.memories.items()]


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def model():
    """A trained model whose router biases are numbers that bfloat16 does not have."""
    model = train(make())
    for name, buffer in model.named_buffers():
        if "selection_bias" in name:
            buffer.copy_(torch.linspace(-0.01, 0.0123, buffer.numel()))
    return model


@pytest.fixture
def folded():
    """A vocabulary map that takes pairs of ids for one."""
    return np.arange(VOCABULARY) // 2
