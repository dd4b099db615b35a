"""Bad inputs are refused in words before anything is written: no state, no table, no counter."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from byrote.nn.router import Router
from tests.models.conftest import VOCABULARY, make

BATCH, LENGTH = 2, 6


@pytest.fixture(params=[True, False], ids=["memory", "plain"])
def model(request):
    """In training mode, where routers count."""
    return make(**({} if request.param else {"memory_layers": []})).train()


@pytest.fixture
def ids():
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(7))


def prefill(model, ids, **kwargs):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.eval()(input_ids=ids, past_key_values=cache, **kwargs)
    return cache


def held(model, cache=None):
    """All that a forward may write to."""
    parts = [module.counts for module in model.modules() if isinstance(module, Router)]
    if model.model.memories is not None:
        for _, memory in model.model.memories.items():
            parts += [memory.table.rows.clone(), *memory.lookup.pending.parts]
    if cache is not None:
        parts += [copy.deepcopy(cache.layers[-1].tails), cache.get_seq_length()]
        parts += [copy.deepcopy(layer.keys) for layer in cache.layers[:-1]]
    return parts


def assert_refused(model, message, *, cache=None, error=ValueError, **inputs):
    before = held(model, cache)
    with pytest.raises(error, match=message):
        model(past_key_values=cache, **inputs)
    torch.testing.assert_close(held(model, cache), before, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [-1, VOCABULARY, 2**40])
@pytest.mark.parametrize("cached", [True, False])
def test_ids_outside_of_the_vocabulary(model, ids, bad, cached):
    cache = prefill(model, ids) if cached else None
    wrong = ids.clone()
    wrong[1, 2] = bad
    message = rf"input_ids\[1, 2\] is {bad}; the vocabulary has the ids 0 .. {VOCABULARY - 1}"
    assert_refused(model, message, input_ids=wrong, cache=cache)
    if cached:  # and the cache goes on as if nothing had been
        again = prefill(model, ids)
        with torch.no_grad():
            expected = model(input_ids=ids, past_key_values=again).logits
            assert torch.equal(model(input_ids=ids, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("garbage", [-100, VOCABULARY, 2**40])
def test_what_is_under_padding_does_not_matter(model, ids, garbage):
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    clean = torch.where(mask.bool(), ids, 2)
    spoiled = torch.where(mask.bool(), ids, garbage)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=clean, attention_mask=mask).logits
        logits = model(input_ids=spoiled, attention_mask=mask).logits
    # Nearly: a product of the experts over other rows may round otherwise.
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-6, rtol=0)


def test_embeddings_without_ids(model, ids):
    embeddings = model.get_input_embeddings()(ids)
    assert_refused(model, "input_ids is missing: give token ids")
    if model.memory_stack is not None:
        assert_refused(model, "a memory is addressed by token ids; pass them beside", inputs_embeds=embeddings)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        if model.memory_stack is None:
            assert torch.equal(model(inputs_embeds=embeddings).logits, expected)
            tokens = model.generate(inputs_embeds=embeddings, max_new_tokens=3)
            assert torch.equal(tokens, model.generate(ids, max_new_tokens=3)[:, LENGTH:])
        assert torch.equal(model(input_ids=ids, inputs_embeds=embeddings).logits, expected)


SHAPES = {
    "ids of one dimension": ({"input_ids": (LENGTH,)}, "input_ids"),
    "a mask too short": ({"attention_mask": (BATCH, LENGTH - 1)}, "attention_mask must be"),
    "a mask of other rows": ({"attention_mask": (1, LENGTH)}, "attention_mask must be"),
    "a mask of four dimensions": ({"attention_mask": (BATCH, 1, LENGTH, LENGTH)}, "attention_mask must be"),
    "positions too short": ({"position_ids": (1, LENGTH - 2)}, "position_ids must be"),
    "positions of other rows": ({"position_ids": (3, LENGTH)}, "position_ids must be"),
    "labels too short": ({"labels": (BATCH, LENGTH - 1)}, "labels must be"),
    "labels of other rows": ({"labels": (BATCH + 1, LENGTH)}, "labels must be"),
    "embeddings too short": ({"inputs_embeds": (BATCH, LENGTH - 1, 64)}, "inputs_embeds must be"),
    "embeddings too narrow": ({"inputs_embeds": (BATCH, LENGTH, 32)}, "inputs_embeds must be"),
}


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(("shapes", "message"), SHAPES.values(), ids=SHAPES)
def test_shapes(model, ids, shapes, message, cached):
    cache = prefill(model, ids) if cached else None
    inputs = {"input_ids": ids}
    for name, shape in shapes.items():
        inputs[name] = torch.ones(shape, dtype=torch.float32 if name == "inputs_embeds" else torch.int64)
    assert_refused(model, message, cache=cache, **inputs)


def test_no_tokens(model):
    assert_refused(
        model, r"input_ids is \[2, 0\]: give at least one token", input_ids=torch.empty(2, 0, dtype=torch.int64)
    )


def test_ids_that_are_not_integers(model, ids):
    assert_refused(model, "input_ids", input_ids=ids.float())


@pytest.mark.parametrize("wrong", [VOCABULARY, -5])
def test_labels_outside_of_the_vocabulary(model, ids, wrong):
    labels = ids.clone()
    labels[0, 3] = wrong
    assert_refused(model, rf"labels\[0, 3\] is {wrong}", input_ids=ids, labels=labels)


def test_a_mask_that_forgets_the_cache(model, ids):
    cache = prefill(model, ids)
    assert_refused(
        model,
        rf"attention_mask must be \[{BATCH}, {2 * LENGTH}\]",
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        cache=cache,
    )


def test_a_cache_of_another_batch_size(model, ids):
    cache = prefill(model, ids)
    assert_refused(model, "holds 2 rows, input_ids 1", input_ids=ids[:1], cache=cache)


def test_a_cache_that_another_model_filled(model, ids):
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
        )
    )
    cache = other(input_ids=ids).past_key_values
    before = held(model)
    with pytest.raises(ValueError, match="filled by another model"):
        model(input_ids=ids, past_key_values=cache)
    torch.testing.assert_close(held(model), before)
    assert len(cache.layers) == 4


def test_a_cache_of_another_shape(model, ids):
    for overrides in ({"num_hidden_layers": 3}, {"memory_layers": [0, 3]}, {"memory_table_sizes": [99] * 3}):
        cache = prefill(make(**overrides), ids)
        assert_refused(model, "past_key_values holds the memory state of another model", input_ids=ids, cache=cache)


def test_a_refused_call_does_not_bind_the_cache(model, ids):
    """An empty cache that was refused with two rows may be used with one."""
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError):
        model(input_ids=ids + VOCABULARY, past_key_values=cache)
    with torch.no_grad():
        model(input_ids=ids[:1], past_key_values=cache)


def test_a_cache_under_gradient_checkpointing(model, ids):
    model.gradient_checkpointing_enable()
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids=ids, past_key_values=cache)
    model(input_ids=ids, labels=ids).loss.backward()


def test_an_empty_batch_of_labels_is_no_error(model, ids):
    """All labels masked, as the last micro-batch of a rank may have it."""
    labels = torch.full_like(ids, -100)
    loss = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert loss == 0
    for _, memory in model.model.memories.items() if model.model.memories is not None else ():
        assert memory.lookup.pending.take() is None
