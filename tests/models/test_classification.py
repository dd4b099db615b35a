"""Heads that judge, from a language model's folder and back."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from byrote import DLCMConfig, DLCMForCausalLM
from tests.models.conftest import VOCABULARY, make


def dlcm():
    torch.manual_seed(0)
    return DLCMForCausalLM(DLCMConfig(vocab_size=VOCABULARY, memory_layers=[0]))


@pytest.mark.parametrize("language_model", [make, dlcm])
def test_a_judge_of_texts(language_model, ids, tmp_path):
    """Of a padded row it judges the last token; it learns, rows included, and is saved with its tables."""
    model = language_model().eval()
    model.save_pretrained(tmp_path / "language model")
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "language model", num_labels=3).eval()
    pad = model.config.pad_token_id
    padded = torch.cat([ids, torch.full((2, 3), pad)], dim=1)
    with torch.no_grad():
        hidden = model.model(ids, use_cache=False).last_hidden_state
        logits = judge(padded, attention_mask=(padded != pad).long()).logits
        torch.testing.assert_close(logits, judge.score(hidden)[:, -1], rtol=0, atol=1e-6)
    judge.train()
    judge(ids, labels=torch.tensor([0, 2])).loss.backward()
    assert judge.score.weight.grad.abs().sum() > 0
    assert all(memory.lookup.pending.parts for _, memory in judge.memory_stack.items())
    judge.eval().save_pretrained(tmp_path / "judge")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, judge(ids).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("language_model", [make, dlcm])
def test_a_judge_of_tokens(language_model, ids, tmp_path):
    model = language_model().eval()
    model.save_pretrained(tmp_path)
    judge = AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=2).eval()
    with torch.no_grad():
        outputs = judge(ids, labels=ids % 2)
        hidden = model.model(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(outputs.logits, judge.score(hidden), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        outputs.loss, torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), (ids % 2).flatten())
    )
