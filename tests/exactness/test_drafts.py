"""Drafts of the prediction modules: those of a slow twin that keeps nothing, and text that is that of plain greedy."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import LogitsProcessor, LogitsProcessorList

from byrote.models.engram.draft import Drafter
from byrote.nn.rope import rotary
from tests.exactness.conftest import VOCABULARY, build

MODELS = [(1, 2), (4, 1), (4, 3), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in [(1, 1), (1, 3), (4, 2)])]
WIDTHS = pytest.mark.parametrize(("num_streams", "modules"), MODELS)


class FewWords(LogitsProcessor):
    """Three words are left to choose from, which depend on the last one: modules that know nothing are often right."""

    def __call__(self, input_ids, scores):
        first = int(input_ids[0, -1]) % 7 + 3
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        allowed[:, [first, first + 7, first + 11]] = True
        return scores.masked_fill(~allowed, float("-inf"))


class AliveOnly:
    def __init__(self, length):
        self.alive = torch.ones(1, length, dtype=torch.bool)


@torch.no_grad()
def drafts_from_scratch(model, ids, context, count, processor):
    """`ids`: the document with its newest token. Every module over every place, without a cache."""
    known, drafted = ids, []
    places = ids.shape[1] - 1
    streams = model(input_ids=ids[:, :-1], use_cache=False, output_streams=True).streams
    angles = rotary(torch.arange(places)[None], model.config.qk_rope_head_dim, theta=model.config.rope_theta)
    for k, module in enumerate(model.model.mtp, start=1):
        embeddings = model.model.embed_tokens(known[:, k:])
        streams = module.block(module.combine(embeddings, streams), angles, None, AliveOnly(places)).streams
        logits = model.lm_head(module.norm(module.exit(streams)))[:, -1]
        logits = processor(torch.cat([context, *drafted], dim=1), logits) if processor else logits
        if k <= count:
            yield logits
        drafted.append(logits.argmax(-1, keepdim=True))
        known = torch.cat([known, drafted[-1]], dim=1)


@pytest.fixture
def spied(monkeypatch):
    """Every call of a drafter: the ids it was given, with drafts, and their logits."""
    calls, original = [], Drafter.get_candidates

    def spy(self, input_ids, **kwargs):
        ids, logits = original(self, input_ids, **kwargs)
        calls.append((input_ids, ids, logits))
        return ids, logits

    monkeypatch.setattr(Drafter, "get_candidates", spy)
    return calls


def assert_from_scratch(model, calls, processor, dead=slice(0, 0)):
    """`dead`: the places of the prompt that are not of the last document."""
    assert calls[0][2] is None  # the trunk comes first
    compared = 0
    for given, candidates, logits in calls[1:]:
        if logits is None:
            continue
        assert torch.equal(candidates[:, : given.shape[1]], given)
        count = logits.shape[1]
        document = torch.cat([given[:, : dead.start], given[:, dead.stop :]], dim=1)
        expected = torch.stack(list(drafts_from_scratch(model, document, given, count, processor)), dim=1)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        assert torch.equal(candidates[:, given.shape[1] :], expected.argmax(-1))
        compared += count
    return compared


def generate(model, ids, length=30, processor=None, **kwargs):
    processors = LogitsProcessorList([processor] if processor else [])
    return model.generate(ids, max_new_tokens=length, do_sample=False, logits_processor=processors, **kwargs)


@WIDTHS
@pytest.mark.parametrize("prompt", [1, 2, 9])
def test_drafts_are_those_of_the_slow_twin(num_streams, modules, prompt, ids, spied):
    model = build(num_streams=num_streams, modules=modules)
    plain = generate(model, ids[:1, :prompt], processor=FewWords())
    drafted = generate(model, ids[:1, :prompt], processor=FewWords(), use_mtp=True)
    assert torch.equal(drafted, plain)
    compared = assert_from_scratch(model, spied, FewWords())
    counts = model.drafts
    assert compared == counts.drafted and counts.tokens == 30
    assert counts.forwards + counts.accepted == 30
    assert 0 < counts.accepted < counts.drafted  # some are taken back, some are not


@WIDTHS
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_text_is_that_without_drafts(num_streams, modules, seed, ids):
    model = build(num_streams=num_streams, modules=modules, seed=seed, convolution=seed == 0, moe=seed == 0)
    for prompt in (ids[:1], ids[1:2, :4]):
        assert torch.equal(generate(model, prompt, use_mtp=True), generate(model, prompt))


@pytest.mark.parametrize("length", range(1, 8))
def test_no_token_too_many(length, ids, spied):
    model = build(num_streams=4, modules=3)
    plain = generate(model, ids[:1], length, FewWords())
    assert torch.equal(generate(model, ids[:1], length, FewWords(), use_mtp=True), plain)
    assert plain.shape[1] == 24 + length
    assert all(candidates.shape[1] < 24 + length for _, candidates, _ in spied)


@pytest.mark.parametrize("modules", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_an_end_stops_it(modules, ids):
    model = build(modules=modules)
    plain = generate(model, ids[:1], processor=FewWords())[0, 24:].tolist()
    # Not the prompt's last word: transformers 5.17 takes such a prompt for a text that is done.
    for end in sorted(set(plain) - {int(ids[0, -1])}):
        stopped = generate(model, ids[:1], processor=FewWords(), eos_token_id=end)
        assert stopped[0, 24:].tolist() == plain[: plain.index(end) + 1]
        drafted = generate(model, ids[:1], processor=FewWords(), eos_token_id=[end, 63], use_mtp=True)
        assert torch.equal(drafted, stopped)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("num_streams", "modules"), [(1, 2), (4, 3)])
def test_a_padded_prompt(num_streams, modules, side, ids, spied):
    """What stands under left padding reaches neither text nor drafts; at the right, it does not change the text."""
    model = build(num_streams=num_streams, modules=modules)
    padded, mask = torch.full((1, 14), 3), torch.ones(1, 14, dtype=torch.long)
    place, dead = (slice(5, 14), slice(0, 5)) if side == "left" else (slice(0, 9), slice(9, 14))
    padded[:, place], mask[:, dead] = ids[:1, :9], 0
    plain = generate(model, padded, processor=FewWords(), attention_mask=mask)
    spied.clear()
    drafted = generate(model, padded, processor=FewWords(), attention_mask=mask, use_mtp=True)
    assert torch.equal(drafted, plain)
    if side == "left":
        assert torch.equal(plain[:, 5:], generate(model, ids[:1, :9], processor=FewWords()))
        assert assert_from_scratch(model, spied, FewWords(), dead) > 10


def test_a_packed_prompt(ids, spied):
    """Drafts continue the last document, and only it."""
    model = build(num_streams=4, modules=2)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    drafted = generate(model, ids[:1], processor=FewWords(), position_ids=positions, use_mtp=True)
    assert torch.equal(drafted[:, 10:], generate(model, ids[:1, 10:], processor=FewWords()))
    calls = [call for call in spied if call[0].shape[1] >= 24]
    assert assert_from_scratch(model, calls, FewWords(), dead=slice(0, 10)) > 10


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="5.17 feeds the cached tokens again")
def test_a_prompt_that_is_partly_cached(ids):
    model = build(num_streams=4, modules=2)
    cache = model(input_ids=ids[:1, :20], use_cache=True).past_key_values
    drafted = generate(model, ids[:1], past_key_values=cache, use_mtp=True)
    assert torch.equal(drafted, generate(model, ids[:1]))


def test_sampling_keeps_the_distribution(ids):
    """Of the second new token, which a draft proposes: frequencies against the exact probabilities."""
    model = build(modules=1)
    prompt, runs = ids[:1, :6], 250
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 4, "max_new_tokens": 3}
    torch.manual_seed(0)
    drafted = torch.cat([model.generate(prompt, use_mtp=True, **settings) for _ in range(runs)])[:, 6:]
    assert 0 < model.drafts.forwards <= 3

    def probabilities(ids):
        logits = model(input_ids=ids, use_cache=False).logits[0, -1] / 1.5
        return torch.where(logits >= logits.topk(4).values[-1], logits, -torch.inf).softmax(-1)

    with torch.no_grad():
        first = probabilities(prompt)
        second = torch.zeros(VOCABULARY)
        for token in first.nonzero().flatten():
            second += first[token] * probabilities(torch.cat([prompt, token.view(1, 1)], dim=1))
    for place, expected in ((0, first), (1, second)):
        found = torch.bincount(drafted[:, place], minlength=VOCABULARY) / runs
        error = (expected * (1 - expected) / runs).sqrt()
        assert bool(((found - expected).abs() <= 4 * error + 1e-9).all()), place


def test_drafts_accepted_under_sampling(ids):
    model = build(num_streams=4, modules=2)
    torch.manual_seed(0)
    processors = LogitsProcessorList([FewWords()])
    model.generate(ids[:1], max_new_tokens=40, do_sample=True, logits_processor=processors, use_mtp=True)
    assert model.drafts.tokens == 40 and 0 < model.drafts.accepted < model.drafts.drafted


def test_what_cannot_be_drafted_is_refused(ids):
    with pytest.raises(ValueError, match="train one with num_nextn_predict_layers=1"):
        generate(build(), ids[:1], use_mtp=True)
    with pytest.raises(ValueError, match="batch_size = 1"):
        generate(build(modules=1), ids, use_mtp=True)
