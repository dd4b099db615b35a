"""PEFT: LoRA attaches, trains and saves; it freezes the anchors, and with them the tables."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from byrote import EngramForCausalLM
from tests.models.conftest import VOCABULARY, logits, make, tables, train
from tests.models.dlcm.conftest import make as make_dlcm


def lora(model, **options):
    config = {"r": 4, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM", "lora_alpha": 8}
    return get_peft_model(model, LoraConfig(**{**config, **options}))


def test_lora_trains_and_tables_stay(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "base")
    before = [table.rows.clone() for table in tables(model)]
    expected = logits(model, ids)
    adapted = lora(model)
    assert torch.equal(logits(adapted, ids), expected)  # LoRA begins as the identity
    trainable = {name.rsplit(".", 3)[1] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}
    train(adapted, steps=5, lr=1e-2)
    assert all(not memory.anchor.requires_grad for _, memory in model.model.memories.items())
    for table, rows in zip(tables(model), before, strict=True):
        assert torch.equal(table.rows, rows) and table.generation == 3
    changed = logits(adapted, ids)
    assert (changed - expected).abs().max() > 1e-3

    adapted.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("table-*"))
    base = EngramForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, ids), changed, atol=1e-6, rtol=0)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), changed, atol=1e-5, rtol=0)


def test_the_loss_goes_down_and_generation_is_cached(model, ids):
    adapted = lora(model)
    batch = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = adapted(input_ids=batch, labels=batch).loss
    train(adapted, steps=20, lr=1e-2)
    with torch.no_grad():
        assert adapted(input_ids=batch, labels=batch).loss < before - 0.01
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(
        adapted.generate(input_ids=ids, **options),
        adapted.generate(input_ids=ids, use_cache=False, **options),
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_with_gradient_checkpointing(model, use_reentrant):
    adapted = lora(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        adapted.enable_input_require_grads()
    adapted.train()
    batch = torch.randint(3, VOCABULARY, (2, 16))
    adapted(input_ids=batch, labels=batch).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_an_anchor_that_is_set_free_moves_its_table(model):
    """`requires_grad` of the anchor is the only switch."""
    before = [table.rows.clone() for table in tables(model)]
    adapted = lora(model)
    model.model.memories.memories["2"].anchor.requires_grad_(True)
    train(adapted, steps=2)
    assert torch.equal(tables(model)[0].rows, before[0]) and not torch.equal(tables(model)[1].rows, before[1])


def both(model, ids):
    """Logits of one forward, and of one token a step."""
    with torch.no_grad():
        full, cache, steps = model(input_ids=ids, use_cache=False).logits, None, []
        for token in ids.split(1, dim=1):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    return full, torch.cat(steps, dim=1)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": [], "target_parameters": ["experts.gate_up", "experts.down"]},
        {"target_modules": ["q_proj"], "target_parameters": ["router.weight"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["embed_tokens", "kv_b_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["experts", "memory"]},
    ],
    ids=["stacked experts", "router", "dora", "embedding and latents", "whole modules"],
)
def test_whatever_peft_adapts_is_in_training_and_in_cached_decoding(model, ids, options):
    adapted = lora(model, r=2, **options)
    expected = logits(adapted, ids)
    train(adapted, steps=3, lr=3e-2)
    learned = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert learned and all(
        parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters()
    )
    full, cached = both(adapted.eval(), ids)
    assert (full - expected).abs().max() > 1e-3
    torch.testing.assert_close(cached, full, atol=1e-5, rtol=0)
    if "embed_tokens" not in options["target_modules"]:  # PEFT merges half of tied embeddings, in any model
        torch.testing.assert_close(logits(adapted.merge_and_unload(), ids), full, atol=1e-5, rtol=0)


def test_rows_that_moved_beside_an_adapter_are_not_lost_in_silence(model, ids, tmp_path):
    """An adapter's folder holds none: it is refused, and what the words name keeps them."""
    model.save_pretrained(tmp_path / "base")
    model = EngramForCausalLM.from_pretrained(tmp_path / "base")
    adapted = lora(model)
    model.memory_stack.requires_grad_(True)
    adapted.save_pretrained(tmp_path / "before")  # nothing was trained beside it
    train(adapted, steps=2)
    with pytest.raises(ValueError, match=r"tables of layers \[1, 2\] were trained beside an adapter.*merge_and_unload"):
        adapted.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("adapter*"))
    expected = logits(adapted, ids)
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    loaded = EngramForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(logits(loaded, ids), expected, atol=1e-5, rtol=0)


def test_an_adapter_of_transformers_own(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "base")
    base = EngramForCausalLM.from_pretrained(tmp_path / "base")
    base.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    train(base, steps=2, lr=1e-2)
    base.save_pretrained(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "adapter").iterdir()}
    other = EngramForCausalLM.from_pretrained(tmp_path / "base")
    other.load_adapter(str(tmp_path / "adapter"))
    again = EngramForCausalLM.from_pretrained(tmp_path / "adapter")  # the base, and the adapter on it
    for loaded in (other, again):
        torch.testing.assert_close(logits(loaded.eval(), ids), logits(base, ids), atol=1e-6, rtol=0)
    base.memory_stack.requires_grad_(True)
    train(base, steps=1)
    with pytest.raises(ValueError, match="were trained beside an adapter"):
        base.save_pretrained(tmp_path / "another")


def test_a_checkpoint_of_trainable_parameters_lacks_the_rows(model, ids, tmp_path):
    model.save_pretrained(tmp_path / "base")
    train(model, steps=1)
    expected = logits(model, ids)
    torch.save({name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, tmp_path / "trained.pt")
    loaded = EngramForCausalLM.from_pretrained(tmp_path / "base").eval()
    loaded.load_state_dict(torch.load(tmp_path / "trained.pt"), strict=False)
    with pytest.raises(RuntimeError, match=r"checkpoint of trainable parameters alone.*load_tables\(folder\)"):
        logits(loaded, ids)
    model.memory_stack.save_tables(tmp_path)
    loaded.load_tables(tmp_path)
    torch.testing.assert_close(logits(loaded, ids), expected, atol=1e-6, rtol=0)
    model.load_state_dict(dict(model.named_parameters()), strict=False)  # to and fro, within a training
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("build", [make, lambda: make(q_lora_rank=8), make_dlcm], ids=["engram", "low rank", "dlcm"])
def test_lora_without_target_modules(build, ids):
    adapted = get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM"))
    found = {name.split(".lora_")[0].rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert found and found <= {"q_proj", "q_b_proj", "kv_b_proj", "v_proj", "o_proj"}
    adapted(input_ids=ids, labels=ids).loss.backward()


def test_prompts_that_are_no_tokens(ids):
    """Virtual tokens have no ids: without a memory they work, with one the remedy is named."""
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    mask = torch.ones_like(ids)
    plain = get_peft_model(make(memory_layers=[]), PromptTuningConfig(**options))
    plain(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert plain.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2).shape == (2, 14)
    for config in (PromptTuningConfig(**options), PrefixTuningConfig(**options)):
        with pytest.raises(ValueError, match="LoRA"):
            get_peft_model(make(), config)(input_ids=ids, attention_mask=mask, labels=ids)
