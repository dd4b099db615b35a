"""Four streams: they start as one plain residual, come apart in training, and a memory adds to each."""

import pytest
import torch

from byrote.nn.hyper import MeanExit, Residual
from byrote.train.optimizer import Optimizer
from tests.models.conftest import logits, make, train

KINDS = ("mhc", "mhc_paper", "hc")
CONNECTION = ("_connection.", ".exit.")


def connections(model):
    return [module for layer in model.model.layers for module in (layer.attention_connection, layer.experts_connection)]


@torch.no_grad()
def spread(model, ids):
    """Distance of the last streams from their mean, in units of their size."""
    seen = []
    handle = model.model.exit.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    [streams] = seen
    return float((streams - streams.mean(dim=2, keepdim=True)).square().mean().sqrt() / streams.square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_one_stream_is_the_plain_residual(kind, ids):
    model = make(stream_connection=kind)
    assert all(type(connection) is Residual for connection in connections(model))
    assert type(model.model.exit) is MeanExit
    assert not any(mark in name for name in model.state_dict() for mark in CONNECTION)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_streams", [2, 4])
@pytest.mark.parametrize("dense_layers", [1, 4])
def test_the_start_is_the_plain_residual_net(kind, num_streams, dense_layers, ids):
    settings = {"memory_layers": [], "first_k_dense_replace": dense_layers, "initializer_range": 0.1}
    plain = make(**settings).eval()
    model = make(num_streams=num_streams, stream_connection=kind, **settings).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(any(mark in f".{name}" for mark in CONNECTION) for name in missing)
    expected = logits(plain, ids)
    error = float((logits(model, ids) - expected).abs().max() / expected.abs().max())
    assert error < 1e-5 and spread(model, ids) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_memory_starts_as_that_of_the_plain_residual_net(kind, ids):
    settings = {"initializer_range": 0.1, "memory_initializer_range": 1.0, "memory_fusion": "single"}
    plain = make(**settings).eval()
    model = make(num_streams=4, stream_connection=kind, **settings).eval()
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all(any(mark in f".{name}" for mark in CONNECTION) for name in missing)
    expected = logits(plain, ids)
    without = logits(make(**{**settings, "memory_layers": []}).eval(), ids)
    assert float((expected - without).abs().max()) > 0.1  # the memory matters
    error = float((logits(model, ids) - expected).abs().max() / expected.abs().max())
    assert error < 1e-5 and spread(model, ids) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_streams_come_apart(kind, ids):
    model = train(make(memory_layers=[], num_streams=4, stream_connection=kind), steps=10, lr=1e-2)
    assert spread(model, ids) > 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_from_equal_biases_they_never_would(kind, ids):
    """That the test above can fail: mHC would silently do nothing."""
    model = make(memory_layers=[], num_streams=4, stream_connection=kind)
    for connection in connections(model):
        pre = connection.bias.data[:4]
        pre.fill_(float(torch.tensor(0.25).logit()) if kind != "hc" else 0.25)
    assert spread(train(model, steps=10, lr=1e-2), ids) < 1e-4


def test_a_memory_adds_to_every_stream(ids):
    """Directly: what it adds has passed no connection."""
    model = make(num_streams=4, memory_layers=[0])
    block = model.model.layers[0]
    block.attention.o_proj.weight.data.zero_()
    block.experts.down_proj.weight.data.zero_()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    block.memory.key_gain.normal_()
    for connection in (block.attention_connection, block.experts_connection):
        connection.bias[8:] = -100.0 * (1 - torch.eye(4)).flatten()
    addends, outputs = [], []
    block.memory.register_forward_hook(lambda module, args, output: addends.append(output[0]))
    block.register_forward_hook(lambda module, args, output: outputs.append((args[0], output[0])))
    model(input_ids=ids, use_cache=False)
    [(before, after)], [addend] = outputs, addends
    torch.testing.assert_close(after, before + addend, atol=1e-4, rtol=0)
    assert (addend - addend.mean(dim=2, keepdim=True)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_biases_and_scales_are_not_decayed(kind):
    model = make(num_streams=4, stream_connection=kind)
    decay = {id(p): group["weight_decay"] for group in Optimizer(model).param_groups for p in group["params"]}
    seen = {name: decay[id(p)] for name, p in model.named_parameters() if any(mark in name for mark in CONNECTION)}
    assert len(seen) == 3 * (2 * 4 + (kind == "mhc"))
    for name, weight_decay in seen.items():
        assert weight_decay == (0.1 if name.endswith("weight") else 0.0), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model(kind, ids, tmp_path):
    model = train(make(num_streams=4, stream_connection=kind))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in half.named_parameters():
        if any(mark in name for mark in CONNECTION):
            assert parameter.dtype == torch.float32 and torch.equal(parameter, model.get_parameter(name)), name
        else:
            assert parameter.dtype == torch.bfloat16, name
    torch.testing.assert_close(logits(half, ids).float(), logits(model, ids), atol=0.1, rtol=0.1)
