"""Models whose every part matters: random convolution, gains, rows and router bias, and margins that say so."""

from __future__ import annotations

import pytest
import torch

from byrote import EngramConfig, EngramForCausalLM
from byrote.nn.hyper import GatedExit, ManifoldConnection
from byrote.nn.router import Router

VOCABULARY = 64
TOLERANCE = 1e-5


def build(
    *,
    convolution: bool = True,
    moe: bool = True,
    layers: int = 2,
    num_streams: int = 1,
    memory_fusion: str = "streams",
    modules: int = 0,
    seed: int = 0,
) -> EngramForCausalLM:
    torch.manual_seed(seed)
    config = EngramConfig.from_preset(
        "nano",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_streams=num_streams,
        memory_fusion=memory_fusion,
        num_nextn_predict_layers=modules,
        memory_layers=[1] if layers == 1 else [0, 2],
        memory_table_sizes=[101, 211],
        memory_kernel_size=4 if convolution else 0,
        memory_initializer_range=1.0,
        first_k_dense_replace=1 if moe else 3,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = EngramForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gain" in name or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "conv_weight" in name:
                parameter.normal_(0, 0.5)
        for module in model.modules():
            if isinstance(module, Router):
                module.selection_bias.normal_(0, 0.05)
            elif isinstance(module, ManifoldConnection | GatedExit):
                module.weight.normal_(0, 0.1)
                module.bias.add_(0.5 * torch.randn_like(module.bias))
                module.scale.fill_(0.5)
    if modules:  # beside the same trunk
        plain = build(convolution=convolution, moe=moe, layers=layers, num_streams=num_streams, seed=seed)
        model.load_state_dict(plain.state_dict(), strict=False)
    return model


class Trace:
    """Row ids and routing margins of every forward of a model, while it is open."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.rows: list[dict[int, torch.Tensor]] = []
        self.margins: list[torch.Tensor] = []

    def __enter__(self) -> Trace:
        def tickets(module, args, output):
            self.rows.append({layer: ticket.rows for layer, ticket in output.items()})

        def routed(module, args, output):
            scores = (output[2] + module.selection_bias).sort(dim=-1, descending=True).values
            self.margins.append((scores[..., module.top_k - 1] - scores[..., module.top_k]).min())

        self.hooks = [self.model.model.memories.register_forward_hook(tickets)]
        self.hooks += [m.register_forward_hook(routed) for m in self.model.modules() if isinstance(m, Router)]
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()
        # Two computations may route a token differently only where its scores are nearly tied.
        assert all(margin > 1e-6 for margin in self.margins), "a routing margin is too small: choose another seed"

    def all_rows(self, layer: int) -> torch.Tensor:
        return torch.cat([rows[layer] for rows in self.rows], dim=1)


SHAPES = {
    "one_layer": {"layers": 1, "num_streams": 1, "modules": 1},
    "two_layers": {"layers": 2, "num_streams": 1, "modules": 0},
    "four_streams": {"layers": 2, "num_streams": 4, "modules": 2},
}
VARIANTS = [
    # Two options of different kinds meet in one of those that are not slow.
    pytest.param(
        {"convolution": convolution, "moe": moe, **SHAPES[shape]},
        id=f"{shape}-{'convolution' if convolution else 'plain'}-{'moe' if moe else 'dense'}",
        marks=() if (convolution == moe) is (shape != "two_layers") else pytest.mark.slow,
    )
    for shape in SHAPES
    for convolution in (True, False)
    for moe in (True, False)
]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """The options of `build` that `model` was made with."""
    return request.param


@pytest.fixture(scope="module")
def built(variant):
    return build(**variant)


@pytest.fixture
def model(built):
    torch.manual_seed(0)
    yield built
    built.zero_grad()


@pytest.fixture
def ids():
    """Three rows of 24 tokens with repeats, so that n-grams recur."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, 20, (3, 24), generator=generator)


@torch.no_grad()
def full_forward(model, ids, **kwargs):
    with Trace(model) as trace:
        logits = model(input_ids=ids, use_cache=False, **kwargs).logits
    return logits, trace.rows[0]


def assert_same_logits(actual, expected):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
