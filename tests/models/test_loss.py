"""A forward that skips its logits has the same loss and gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from byrote.train.evaluate import loss_options
from tests.models.conftest import make


def gradients(model, **inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    rows = [memory.lookup.pending.take() for _, memory in model.model.memories.items()]
    return outputs, [p.grad.clone() for p in model.parameters() if p.grad is not None] + [r[1] for r in rows if r]


@pytest.mark.parametrize("settings", [{}, {"num_nextn_predict_layers": 1}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("items", [None, 7])
def test_the_same_loss_and_gradients(ids, settings, items):
    model = make(**settings).train()
    labels = ids.clone()
    labels[0, :3] = -100
    inputs = {"input_ids": ids, "labels": labels, "num_items_in_batch": items}
    with_logits, expected = gradients(model, **inputs)
    without, got = gradients(model, **inputs, **loss_options(model))
    assert without.logits is None and with_logits.logits is not None
    torch.testing.assert_close(without.loss, with_logits.loss, rtol=1e-6, atol=0)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max().clamp_min(1)


def test_logits_are_there_without_labels(ids):
    assert make()(input_ids=ids, skip_logits=True).logits is not None


def test_an_adapter_on_the_head_is_seen(ids):
    model = make(tie_word_embeddings=False)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    with_logits = adapted(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(adapted(input_ids=ids, labels=ids, skip_logits=True).loss, with_logits)
    adapted.disable_adapter_layers()
    assert (adapted(input_ids=ids, labels=ids).loss - with_logits).abs() > 1e-3
