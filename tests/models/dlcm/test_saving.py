"""A saved folder holds the whole model, tables too; the Auto classes open it."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline

from byrote import DLCMConfig, DLCMForCausalLM
from byrote.models.dlcm import DLCMModel
from tests.models.conftest import logits, train
from tests.models.dlcm.conftest import FORMS, MEMORIES, VOCABULARY, make, trained


def tables(model):
    return [] if model.memory_stack is None else [memory.table for _, memory in model.memory_stack.items()]


@pytest.mark.parametrize("load", [DLCMForCausalLM, AutoModelForCausalLM])
def test_round_trip(model, ids, tmp_path, load):
    model.save_pretrained(tmp_path)
    loaded, info = load.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is DLCMForCausalLM and not loaded.training
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    for ours, theirs in zip(tables(loaded), tables(model), strict=True):
        assert torch.equal(ours.rows, theirs.rows) and ours.generation == theirs.generation == 3
    assert torch.equal(
        loaded.generate(ids, max_new_tokens=5, do_sample=False), model.generate(ids, max_new_tokens=5, do_sample=False)
    )


def test_the_config_round_trip(model, tmp_path):
    config = model.config
    config.save_pretrained(tmp_path)
    for read in (DLCMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(read) is DLCMConfig
        assert read.to_diff_dict() == config.to_diff_dict()
        assert read.spec == config.spec and read.num_hidden_layers == config.num_hidden_layers == 2
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "byrote_dlcm"


def test_a_saved_config_with_another_depth(tmp_path):
    """The layers that have keys are counted anew."""
    make().config.save_pretrained(tmp_path)
    deeper = DLCMConfig.from_pretrained(tmp_path, num_encoder_layers=3)
    assert deeper.num_hidden_layers == 4
    model = DLCMForCausalLM(deeper)
    assert len(model.model.encoder) == 3 and len(model.model.decoder) == 1
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, 4, VOCABULARY)


def test_saving_again_gives_the_same_bytes(model, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    DLCMForCausalLM.from_pretrained(first).save_pretrained(second)
    assert {path.name for path in first.iterdir()} == {path.name for path in second.iterdir()}
    for path in first.glob("*.safetensors"):
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_loading_spares_what_was_trained(tmp_path):
    """The boundary's matrices start equal; after training they are not, and loading does not start them again."""
    model = trained(boundary_weight=1.0)
    query, key = model.model.concepts.boundary.query.weight, model.model.concepts.boundary.key.weight
    assert not torch.equal(query, key)
    model.save_pretrained(tmp_path)
    loaded = DLCMForCausalLM.from_pretrained(tmp_path).model.concepts.boundary
    assert torch.equal(loaded.query.weight, query) and torch.equal(loaded.key.weight, key)


def test_tied_embeddings(ids, tmp_path):
    model = trained(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = DLCMForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_the_trunk_alone(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    expected = model.model(input_ids=ids, use_cache=False).last_hidden_state
    trunk = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(trunk) is DLCMModel
    assert torch.equal(trunk(input_ids=ids, use_cache=False).last_hidden_state, expected)
    trunk.save_pretrained(tmp_path / "trunk")
    again = AutoModel.from_pretrained(tmp_path / "trunk")
    assert torch.equal(again(input_ids=ids, use_cache=False).last_hidden_state, expected)


def test_the_hidden_state_comes_first(model, ids):
    """As Hugging Face's code takes it, by number."""
    out = model.model(input_ids=ids, output_hidden_states=True)
    assert out[0] is out.last_hidden_state
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(model.model(input_ids=ids, return_dict=False)[0], out.last_hidden_state)
    loss, scores = model(input_ids=ids, labels=ids, return_dict=False)[:2]
    assert loss.dim() == 0 and scores.shape == (2, 12, VOCABULARY)


@pytest.mark.parametrize("form", ["memories", "deepseek"])
def test_a_vocabulary_travels_with_the_model(form, ids, folded, tmp_path):
    model = train(make(vocabulary=folded, **FORMS[form]))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(DLCMForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids))
    fresh = AutoModelForCausalLM.from_config(DLCMConfig.from_pretrained(tmp_path))  # without a tokenizer
    with pytest.raises(RuntimeError, match="vocabulary map is not set"):
        fresh(input_ids=ids)
    fresh.load_state_dict(model.state_dict())
    fresh.load_tables(tmp_path)
    assert torch.equal(logits(fresh.eval(), ids), logits(model, ids))


def test_from_config_needs_no_tokenizer(ids):
    model = AutoModelForCausalLM.from_config(make(**MEMORIES).config)
    assert model(input_ids=ids).logits.shape == (2, 12, VOCABULARY)


def test_tables_stay_in_their_files(ids, tmp_path):
    model = trained(**MEMORIES)
    model.save_pretrained(tmp_path)
    loaded = DLCMForCausalLM.from_pretrained(tmp_path, placement="file", cache="100KB")
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_a_pipeline_from_a_folder(model, word_tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    here = pipeline("text-generation", model=model, tokenizer=word_tokenizer, device="cpu")
    assert generate("t3 t4 t5", **options) == here("t3 t4 t5", **options)


def test_lora(model, ids, tmp_path):
    """It attaches to tokens and to concepts, trains, is saved and merged; nothing else moves."""
    model.save_pretrained(tmp_path / "base")
    base, rows = logits(model, ids), [table.rows.clone() for table in tables(model)]
    options = {"r": 4, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM", "lora_alpha": 8}
    adapted = get_peft_model(model, LoraConfig(**options))
    assert torch.equal(logits(adapted, ids), base)  # LoRA begins as the identity
    touched = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    for part in ("encoder.0.attention.q_proj", "concepts.layers.1.attention.q_proj", "concepts.read.q_proj"):
        assert any(name.endswith(part) for name in touched), part
    batch = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = adapted(input_ids=batch, labels=batch).loss
    train(adapted, steps=20, lr=1e-2)
    with torch.no_grad():
        assert adapted(input_ids=batch, labels=batch).loss < before - 0.01
    assert all(torch.equal(table.rows, old) for table, old in zip(tables(model), rows, strict=True))
    changed = logits(adapted, ids)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = DLCMForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, ids), changed, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), ids), changed, atol=1e-5, rtol=0)
