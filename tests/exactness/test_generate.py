"""`generate` gives the same tokens whatever the mode: cached or not, beams, drafts, static cache, padding."""

import pytest
import torch
from transformers import DynamicCache, pipeline

from byrote.memory import MemoryState
from tests.exactness.conftest import build, full_forward

LENGTH = 20


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=LENGTH, do_sample=False, **kwargs)


@torch.no_grad()
def greedy_by_hand(model, ids):
    for _ in range(LENGTH):
        ids = torch.cat([ids, full_forward(model, ids)[0][:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy(model, ids):
    expected = greedy_by_hand(model, ids)
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(model, ids, use_cache=False), expected)
    assert torch.equal(greedy(model, ids, past_key_values=DynamicCache()), expected)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=5), expected)


def test_static_cache(model, ids):
    assert torch.equal(greedy(model, ids, cache_implementation="static"), greedy_by_hand(model, ids))


def test_left_padded_batch(model, ids):
    batch, mask = torch.zeros(2, 24, dtype=torch.long), torch.zeros(2, 24, dtype=torch.long)
    batch[0], mask[0] = ids[0], 1
    batch[1, 17:], mask[1, 17:] = ids[1, :7], 1
    out = greedy(model, batch, attention_mask=mask)
    assert torch.equal(out[0], greedy_by_hand(model, ids[:1])[0])
    assert torch.equal(out[1, 17:], greedy_by_hand(model, ids[1:2, :7])[0])


def test_beam_search(model, ids):
    kwargs = {"num_beams": 4, "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True}
    cached, plain = greedy(model, ids, **kwargs), greedy(model, ids, use_cache=False, **kwargs)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, atol=1e-5, rtol=0)


def test_draft_model(model, variant, ids):
    """Drafts from a perturbed copy: some accepted, some rolled back. And from another model: nearly all rolled back."""
    expected = greedy_by_hand(model, ids[:1])
    near = build(**variant)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    for draft in (near, build(seed=5)):
        assert torch.equal(greedy(model, ids[:1], assistant_model=draft), expected)


def test_drafts_are_rolled_back(model, ids):
    """The draft test can only mean something where both happens."""
    near = build(convolution=model.config.memory_kernel_size > 0, moe=model.config.first_k_dense_replace == 1)
    seen = []
    crop = MemoryState.crop

    def recording_crop(self, tokens):
        seen.append(tokens)
        return crop(self, tokens)

    MemoryState.crop = recording_crop
    try:
        greedy(model, ids[:1], assistant_model=near)
        greedy(model, ids[:1], prompt_lookup_num_tokens=4)
    finally:
        MemoryState.crop = crop
    assert any(tokens < 0 for tokens in seen)


@pytest.mark.parametrize("num_tokens", [2, 5])
def test_prompt_lookup(model, ids, num_tokens):
    prompt = ids[:1].repeat(1, 2)
    expected = greedy_by_hand(model, prompt)
    assert torch.equal(greedy(model, prompt, prompt_lookup_num_tokens=num_tokens), expected)


def test_pipeline(model, word_tokenizer):
    generator = pipeline("text-generation", model=model, tokenizer=word_tokenizer)
    text = generator("t3 t4 t5", max_new_tokens=LENGTH, do_sample=False, return_full_text=False)[0]["generated_text"]
    expected = greedy_by_hand(model, torch.tensor([[3, 4, 5]]))[0, 3:]
    assert text.split() == word_tokenizer.decode(expected, skip_special_tokens=True).split()
