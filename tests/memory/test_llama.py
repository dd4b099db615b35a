"""The memory runtime serves a model that is not ours: a LlamaForCausalLM, through two hooks."""

from types import MethodType

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from byrote.address import engram
from byrote.memory import MemoryStack, MemoryState, Sequence
from byrote.memory.sequence import NO_POSITION
from byrote.memory.state import Field
from byrote.models.hf import MemoryGenerationMixin
from byrote.nn.engram import Engram
from byrote.tables import RamTable
from byrote.train.optimizer import Optimizer

VOCABULARY, LAYERS, MEMORY_LAYER, HIDDEN, ROW_WIDTH, HEADS = 48, 3, 1, 32, 8, 2


def llama(seed=0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def attach(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Put a memory before block MEMORY_LAYER. Its value projection is zero: the model does what it did."""
    sizes = {"table_sizes": [101, 211], "heads": HEADS, "layer_ids": [MEMORY_LAYER], "pad_id": 0}
    spec = engram(np.arange(VOCABULARY), **sizes)
    table = RamTable(spec.layer(MEMORY_LAYER).rows, ROW_WIDTH, digest=spec.digest, std=1.0)
    model.memories = MemoryStack(spec, np.arange(VOCABULARY), lambda rows, layer: table)
    model.engram = Engram(HIDDEN, spec.columns * ROW_WIDTH, kernel_size=4, dilation=3)
    torch.nn.init.zeros_(model.engram.value.weight)
    fields = model.memories.fields() | {"convolution": Field(model.engram.tail_length, (HIDDEN,), dtype=None)}

    def attach_memory_state(self, cache):
        return MemoryState.attach(cache, LAYERS, fields)

    def before_model(module, args, kwargs):
        """Addresses once, from ids alone; handed down as an argument."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        batch, steps = ids.shape
        cache, state, past = kwargs.get("past_key_values"), None, 0
        if cache is None and kwargs.get("use_cache", True):
            kwargs["past_key_values"] = cache = DynamicCache(config=model.config)
        last_position = torch.full((batch, 1), NO_POSITION)
        last_document = torch.zeros_like(last_position)
        if cache is not None:
            past = cache.get_seq_length()
            past = past.clone() if isinstance(past, torch.Tensor) else past
            state = model.attach_memory_state(cache)
            state.begin(batch, model.dtype, ids.device)
            last_position, last_document = state.tails["position"], state.tails["document"]
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        alive = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[:, -steps:].bool()
        positions = torch.arange(steps)[None] + past if positions is None else positions
        sequence = Sequence.place(positions.expand(batch, -1), alive, past, last_position, last_document)
        tickets = model.memories(ids, sequence, state)
        if state is not None:
            state.advance("position", sequence.position_ids, sequence)
            state.advance("document", sequence.document, sequence)
        return args, {**kwargs, "memory": (tickets[MEMORY_LAYER], sequence, state)}

    def before_block(module, args, kwargs):
        ticket, sequence, state = kwargs["memory"]
        tail = None if state is None else state.tails["convolution"]
        streams = args[0].unsqueeze(2)
        addend, columns = model.engram(streams, ticket.wait(), sequence.alive, sequence.starts, tail)
        if state is not None:
            state.advance("convolution", columns, sequence)
        return (args[0] + addend.squeeze(2), *args[1:]), kwargs

    model.__class__ = type("LlamaWithMemory", (MemoryGenerationMixin, LlamaForCausalLM), {})
    model.attach_memory_state = MethodType(attach_memory_state, model)
    model.register_forward_pre_hook(before_model, with_kwargs=True)
    model.model.layers[MEMORY_LAYER].register_forward_pre_hook(before_block, with_kwargs=True)
    return model


@pytest.fixture
def ids():
    return torch.randint(3, 20, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained():
    """Trained enough that a wrong row, a wrong gate or a wrong tap shows in the logits."""
    model = attach(llama()).train()
    batch = torch.randint(3, 20, (8, 24), generator=torch.Generator().manual_seed(2))
    optimizer = Optimizer(model, lr=2e-2)
    for _ in range(8):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.memories.memories[str(MEMORY_LAYER)].table.generation == 7  # at step 0 no gradient reaches a row
    return model.eval()


@torch.no_grad()
def full(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def in_chunks(model, ids, sizes, cache):
    logits, at = [], 0
    for size in sizes:
        logits.append(model(input_ids=ids[:, at : at + size], past_key_values=cache).logits)
        at += size
    return torch.cat(logits, dim=1)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_identity_at_step_0(ids):
    plain, grafted = llama(), attach(llama())
    assert torch.equal(full(grafted, ids), full(plain, ids))
    assert torch.equal(in_chunks(grafted, ids, [10, 1, 13], None), in_chunks(plain, ids, [10, 1, 13], None))
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(grafted.generate(ids, **options), plain.generate(ids, **options))


def test_training_reaches_every_part(trained, ids):
    gates = trained.engram.conv_weight.abs().amax(), trained.engram.value.weight.abs().amax()
    assert min(gates) > 0.01
    with_memory = full(trained, ids)
    value = trained.engram.value.weight.detach().clone()
    trained.engram.value.weight.data.zero_()
    without = full(trained, ids)
    trained.engram.value.weight.data.copy_(value)
    assert (with_memory - without).abs().mean() > 0.1


@pytest.mark.parametrize("sizes", [[10] + [1] * 14, [1] * 24, [5, 1, 7, 11]])
def test_cached(trained, ids, sizes):
    expected = full(trained, ids)
    assert_close(in_chunks(trained, ids, sizes, DynamicCache()), expected)
    assert_close(in_chunks(trained, ids, sizes, StaticCache(trained.config, max_cache_len=40)), expected)


@pytest.mark.parametrize("cached", [True, False])
def test_left_padding(trained, ids, cached):
    length = 9
    batch, mask = torch.zeros_like(ids[:2]), torch.zeros_like(ids[:2])
    batch[0], mask[0] = ids[0], 1
    batch[1, 24 - length :], mask[1, 24 - length :] = ids[1, :length], 1
    cache = DynamicCache() if cached else None
    with torch.no_grad():
        logits = trained(input_ids=batch, attention_mask=mask, past_key_values=cache, use_cache=cached).logits
    assert_close(logits[0], full(trained, ids[:1])[0])
    assert_close(logits[1, 24 - length :], full(trained, ids[1:2, :length])[0])
    if cached:
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        with torch.no_grad():
            more = trained(input_ids=ids[2:, :1].expand(2, -1), attention_mask=mask, past_key_values=cache).logits
        alone = full(trained, torch.cat([ids[1:2, :length], ids[2:, :1]], dim=1))
        assert_close(more[1], alone[0, -1:])


def by_hand(model, ids, count=16):
    for _ in range(count):
        ids = torch.cat([ids, full(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids


OPTIONS = {"max_new_tokens": 16, "do_sample": False}


def test_greedy_and_prompt_lookup(trained, ids):
    assert torch.equal(trained.generate(ids, **OPTIONS), by_hand(trained, ids))
    prompt = ids[:1].repeat(1, 2)
    expected = by_hand(trained, prompt)
    for count in (2, 5):
        assert torch.equal(trained.generate(prompt, prompt_lookup_num_tokens=count, **OPTIONS), expected)


def test_a_draft_model_without_a_memory(trained, ids):
    expected = by_hand(trained, ids[:1])
    assert torch.equal(trained.generate(ids[:1], assistant_model=llama(), **OPTIONS), expected)


def test_beam_search(trained, ids):
    beams = {"num_beams": 4, "num_return_sequences": 2, **OPTIONS}
    cached = trained.generate(ids, **beams)
    assert torch.equal(cached, trained.generate(ids, use_cache=False, **beams))
