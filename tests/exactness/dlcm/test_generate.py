"""`generate` gives the same tokens whatever the mode: cached or not, beams, drafts, static cache, padding, chunks."""

import pytest
import torch
from transformers import DynamicCache, pipeline

from byrote.memory import MemoryState
from tests.exactness.dlcm.conftest import DEEPSEEK, VARIANTS, build, full_forward, in_chunks

TOKENS = 16


@pytest.fixture(params=["paper", pytest.param("paper, rule", marks=pytest.mark.slow), "memories, open", "deepseek"])
def model(request):
    return build(**VARIANTS[request.param])


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=TOKENS, do_sample=False, **kwargs)


def greedy_by_hand(model, ids, tokens=TOKENS):
    for _ in range(tokens):
        ids = torch.cat([ids, full_forward(model, ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def test_greedy(model, ids):
    expected = greedy_by_hand(model, ids)
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(model, ids, use_cache=False), expected)
    assert torch.equal(greedy(model, ids, past_key_values=DynamicCache()), expected)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=5), expected)
    assert torch.equal(greedy(model, ids, cache_implementation="static"), expected)


def test_left_padded_batch(model, ids):
    batch, mask = torch.zeros(2, 24, dtype=torch.long), torch.zeros(2, 24, dtype=torch.long)
    batch[0], mask[0] = ids[0], 1
    batch[1, 17:], mask[1, 17:] = ids[1, :7], 1
    for options in ({}, {"cache_implementation": "static"}):
        out = greedy(model, batch, attention_mask=mask, **options)
        assert torch.equal(out[0], greedy_by_hand(model, ids[:1])[0])
        assert torch.equal(out[1, 17:], greedy_by_hand(model, ids[1:2, :7])[0])


def test_a_row_that_ends_before_the_others(model, ids):
    """After its end a row is fed padding; the others go on as if it were not there."""
    expected = greedy_by_hand(model, ids)
    new = expected[:, 24:]
    end = next(int(new[0, i]) for i in range(3, TOKENS) if new[0, i] not in new[0, :i] and new[0, i] not in new[1])
    out = greedy(model, ids, eos_token_id=end, pad_token_id=0)
    assert torch.equal(out[1], expected[1])
    stop = 24 + new[0].tolist().index(end) + 1
    assert torch.equal(out[0, :stop], expected[0, :stop]) and not out[0, stop:].any()


def test_beam_search(model, ids):
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "return_dict_in_generate": True}
    cached, plain = greedy(model, ids, **kwargs), greedy(model, ids, use_cache=False, **kwargs)
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, atol=1e-5, rtol=0)


def near(model):
    """A copy with small noise: some of its drafts are accepted, some are not."""
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    stacks = (m.memory_stack.items() if m.memory_stack else () for m in (model, other))
    for (_, theirs), (_, ours) in zip(*stacks, strict=True):
        ours.table.rows.copy_(theirs.table.rows)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return other


def test_drafts(model, ids, monkeypatch):
    """Of a near model, of quite another, and of the prompt itself."""
    crops = []
    crop = MemoryState.crop
    monkeypatch.setattr(MemoryState, "crop", lambda self, tokens: (crops.append(tokens), crop(self, tokens))[-1])
    prompt = ids[:1].repeat(1, 2)
    expected = greedy_by_hand(model, prompt)
    for draft in (near(model), build(seed=5)):
        assert torch.equal(greedy(model, prompt, assistant_model=draft), expected)
    for tokens in (2, 5):
        assert torch.equal(greedy(model, prompt, prompt_lookup_num_tokens=tokens), expected)
    assert any(tokens < 0 for tokens in crops)


def test_sampling_with_a_seed(model, ids):
    def sampled(**kwargs):
        torch.manual_seed(3)
        return model.generate(ids, max_new_tokens=TOKENS, do_sample=True, **kwargs)

    assert torch.equal(sampled(), sampled(use_cache=False))


def test_pipeline(model, word_tokenizer):
    generator = pipeline("text-generation", model=model, tokenizer=word_tokenizer)
    text = generator("t3 t4 t5", max_new_tokens=TOKENS, do_sample=False, return_full_text=False)[0]["generated_text"]
    expected = greedy_by_hand(model, torch.tensor([[3, 4, 5]]))[0, 3:]
    assert text.split() == word_tokenizer.decode(expected, skip_special_tokens=True).split()


@pytest.mark.parametrize("overrides", [{}, {k: v for k, v in DEEPSEEK.items() if "memory" in k}])
def test_without_concept_layers(ids, overrides):
    """The baseline has a cache and all of this too."""
    model = build(num_concept_layers=0, num_decoder_layers=0, num_encoder_layers=3, **overrides)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        cache_logits = [model(input_ids=part, past_key_values=cache).logits for part in ids.split([9, 1, 14], dim=1)]
    torch.testing.assert_close(torch.cat(cache_logits, dim=1), expected, atol=1e-5, rtol=0)
    out = greedy(model, ids[:1])
    assert torch.equal(greedy(model, ids[:1], use_cache=False), out)
    assert torch.equal(greedy(model, ids[:1], prompt_lookup_num_tokens=3), out)
    assert torch.equal(greedy(model, ids[:1], assistant_model=near(model)), out)


def test_boundaries_while_generating(model, ids):
    """The boundaries of a generated text are those of the same text read at once."""
    text = greedy(model, ids)
    whole = full_forward(model, text)
    run, _ = in_chunks(model, text, [24] + [1] * TOKENS)
    assert torch.equal(run.boundaries, whole.boundaries)
