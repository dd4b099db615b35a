"""Bad inputs are refused before anything is written; a refused call leaves the cache as it was."""

import copy

import pytest
import torch
from transformers import DynamicCache

from tests.models.dlcm.conftest import VOCABULARY, make


def prefill(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.eval()(input_ids=ids, past_key_values=cache)
    return cache


WRONG = {
    "floats": (lambda ids: torch.ones(ids.shape), "boundaries must be bool"),
    "numbers": (lambda ids: torch.ones_like(ids), "boundaries must be bool"),
    "too short": (
        lambda ids: torch.ones(2, 5, dtype=torch.bool),
        r"boundaries must be bool \[2, 12\], got .* \[2, 5\]",
    ),
    "one row": (lambda ids: torch.ones(1, 12, dtype=torch.bool), r"got torch.bool \[1, 12\]"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_wrong_boundaries(model, ids, wrong, message):
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, boundaries=wrong(ids))


def test_boundaries_of_a_model_without_concepts(ids):
    model = make(num_concept_layers=0, num_decoder_layers=0)
    with pytest.raises(ValueError, match="num_concept_layers=0 has none"):
        model(input_ids=ids, boundaries=torch.ones(2, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="chooses no boundaries"):
        model.choose_boundaries(ids)


def test_literal_has_no_cache(ids):
    model = make(boundary_convention="literal")
    assert model(input_ids=ids).past_key_values is None
    for options in ({"use_cache": True}, {"past_key_values": DynamicCache(config=model.config)}):
        with pytest.raises(ValueError, match=r"boundary_convention='literal' .* pass use_cache=False"):
            model(input_ids=ids, **options)
    assert model.generate(ids, max_new_tokens=2).shape == (2, 14)


def test_a_cache_under_gradient_checkpointing(model, ids):
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids=ids, past_key_values=DynamicCache(config=model.config))


def test_a_refused_call_leaves_a_cache_alone(model, ids):
    cache = prefill(model, ids)
    state = copy.deepcopy(cache.layers[-1])
    for wrong in (ids + VOCABULARY, ids[:1]):
        with pytest.raises(ValueError, match=r"vocabulary has the ids|holds 2 rows, input_ids 1"):
            model(input_ids=wrong, past_key_values=cache)
    torch.testing.assert_close(cache.layers[-1].tails, state.tails, atol=0, rtol=0)
    torch.testing.assert_close(cache.layers[-1].slots, state.slots, atol=0, rtol=0)
    assert torch.equal(cache.layers[-1].lengths, state.lengths) and cache.get_seq_length() == 12


def test_a_refused_call_does_not_bind_the_cache(model, ids):
    """An empty cache that was refused with two rows may be used with one."""
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError):
        model(input_ids=ids + VOCABULARY, past_key_values=cache)
    with torch.no_grad():
        logits = model(input_ids=ids[:1], past_key_values=cache).logits
    assert logits.shape == (1, 12, VOCABULARY) and len(cache.layers[-1].lengths) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"num_concept_layers": 3},
        {"concept_size": 64},
        {"boundary_convention": "open"},
        {"boundary_size": 7},
        {"num_decoder_layers": 2},
        {"memory_layers": [0]},
        {"num_concept_layers": 0, "num_decoder_layers": 0, "num_encoder_layers": 2},
    ],
)
def test_a_cache_of_another_model(ids, other):
    cache = prefill(make(**other), ids)
    with pytest.raises(ValueError, match="past_key_values"):
        make()(input_ids=ids, past_key_values=cache)


def test_embeddings_in_place_of_the_embedding(model, ids):
    embeddings = model.get_input_embeddings()(ids)
    if model.memory_stack is not None:
        with pytest.raises(ValueError, match="input_ids is missing: a memory is addressed by token ids"):
            model(inputs_embeds=embeddings)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        if model.memory_stack is None:
            assert torch.equal(model(inputs_embeds=embeddings).logits, expected)
        assert torch.equal(model(input_ids=ids, inputs_embeds=embeddings).logits, expected)
