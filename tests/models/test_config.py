"""EngramConfig: presets, round trips, and contradictions that are refused in words."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from byrote import EngramConfig, EngramForCausalLM
from byrote.models.engram.presets import PRESETS
from tests.models.conftest import VOCABULARY, make


def test_a_preset_with_something_changed():
    config = EngramConfig.from_preset("nano", hidden_size=128)
    assert config.hidden_size == 128
    with pytest.raises(ValueError, match=r"preset must be one of .'dense-4b', .*'tiny'.*'huge'"):
        EngramConfig.from_preset("huge")
    assert PRESETS["nano"] == {"memory_layers": [1], "memory_table_sizes": [499, 997]}


@pytest.mark.parametrize("layers", [[], [1]])
@pytest.mark.parametrize("yarn", [None, {"factor": 4.0, "original_length": 64}])
def test_json_round_trip(tmp_path, layers, yarn):
    config = EngramConfig.from_preset("nano", memory_layers=layers, memory_seed=3, yarn=yarn)
    config.save_pretrained(tmp_path)
    for read in (EngramConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(read) is EngramConfig
        assert read.to_diff_dict() == config.to_diff_dict()
        assert read.spec == config.spec and read.yarn_parameters == config.yarn_parameters
    written = json.loads((tmp_path / "config.json").read_text())
    assert "vocabulary" not in written and written["model_type"] == "byrote_engram"


def test_the_address_is_the_one_of_the_vocabulary(folded):
    config = EngramConfig.from_preset("nano", vocabulary=folded)
    assert config.vocab_size == VOCABULARY and config.spec.compressed_vocab_size == VOCABULARY // 2
    again = EngramConfig(**config.to_dict())
    assert again.address == config.address
    anew = EngramConfig(**{**config.to_dict(), "address": None})
    assert anew.spec.vocabulary_digest != config.spec.vocabulary_digest  # without a map, ids stand for themselves


def test_a_model_without_memories():
    config = EngramConfig.from_preset("nano", memory_layers=[])
    model = EngramForCausalLM(config).eval()
    assert config.spec is None and model.model.memories is None
    assert model(input_ids=torch.randint(0, 512, (2, 8))).logits.shape == (2, 8, 512)


CONTRADICTIONS = {
    "num_streams": ({"num_streams": 0}, "at least 1"),
    "stream_connection": ({"stream_connection": "dense"}, "'mhc', 'mhc_paper' or 'hc'"),
    "num_experts_per_tok": ({"num_experts_per_tok": 9}, "n_routed_experts=8"),
    "qk_rope_head_dim": ({"qk_rope_head_dim": 7}, "even"),
    "first_k_dense_replace": ({"first_k_dense_replace": 5}, "num_hidden_layers=4"),
    "memory_layers": ({"memory_layers": [4]}, "0..3"),
    "memory_layers twice": ({"memory_layers": [1, 1]}, "each once"),
    "memory_layers descending": ({"memory_layers": [2, 1]}, "ascending"),
    "memory_layers negative": ({"memory_layers": [-1]}, "0..3"),
    "memory_contract": ({"memory_contract": "qwen"}, "'engram', 'deepseek_v41'"),
    "memory_contract sizes": ({"memory_contract": "deepseek_v41"}, "one table size"),
    "memory_table_sizes": ({"memory_table_sizes": []}, "one positive number"),
    "memory_table_sizes zero": ({"memory_table_sizes": [0, 5]}, "one positive number"),
    "memory_pad_token_id": ({"memory_pad_token_id": 512}, "vocab_size=512"),
    "memory_kernel_size": ({"memory_kernel_size": -1}, "0 or more"),
    "memory_kernel_size without a gate": ({"memory_gate": False}, "0 without a gate"),
    "memory_heads": ({"memory_heads": 0}, "at least 1"),
    "memory_row_width": ({"memory_row_width": 0}, "at least 1"),
    "memory_zero_gate_rule": ({"memory_zero_gate_rule": "up"}, "'sign' or 'copysign'"),
    "scoring_func": ({"scoring_func": "tanh"}, "'sigmoid' or 'softmax'"),
    "n_group": ({"n_group": 3}, "n_routed_experts=8"),
    "topk_group": ({"n_group": 2, "topk_group": 3}, "n_group=2"),
    "yarn": ({"yarn": {"factr": 4.0}}, "factor"),
}


@pytest.mark.parametrize(("overrides", "remedy"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions_are_refused(request, overrides, remedy):
    field = request.node.callspec.id.split()[0]
    with pytest.raises(ValueError) as error:
        EngramConfig.from_preset("nano", **overrides)
    message = str(error.value)
    assert field in message and remedy in message
    value = overrides.get(field, EngramConfig.from_preset("nano").to_dict()[field])
    assert repr(value) in message or field == "yarn"


ADDRESSED = {
    "memory_layers": [2],
    "memory_heads": 4,
    "memory_seed": 5,
    "vocab_size": 600,
    "memory_table_sizes": [499, 997, 1999],
    "memory_contract": "deepseek_v41",
}


@pytest.mark.parametrize(("field", "value"), ADDRESSED.items(), ids=ADDRESSED)
def test_fields_that_contradict_the_address_are_refused(field, value):
    config = EngramConfig.from_preset("nano").to_dict()
    config[field] = value
    if field == "memory_contract":
        config["memory_table_sizes"] = [499, 499]
    with pytest.raises(ValueError, match=f"{field} says .*drop `address`"):
        EngramConfig(**config)


def test_table_sizes_that_contradict_the_address_are_refused():
    config = EngramConfig.from_preset("nano").to_dict()
    config["memory_table_sizes"] = [503, 997]
    with pytest.raises(ValueError, match="memory_table_sizes"):
        EngramConfig(**config)


def test_a_changed_address_is_refused():
    config = EngramConfig.from_preset("nano").to_dict()
    config["address"]["layers"][0]["multipliers"][0] += 2
    with pytest.raises(ValueError, match="digest"):
        EngramConfig(**config)


def test_vocabularies(folded):
    with pytest.raises(ValueError, match="vocabulary maps 64 ids, vocab_size is 63: it must be as many or more"):
        EngramConfig(memory_layers=[1], vocabulary=folded, vocab_size=63)
    config = EngramConfig.from_preset("nano", vocabulary=folded)
    with pytest.raises(ValueError, match="pass the map of the tokenizer"):
        EngramForCausalLM(config, np.arange(VOCABULARY))
    unset = EngramForCausalLM(config)
    with pytest.raises(RuntimeError, match=r"vocabulary map is not set.*vocabulary="):
        unset(input_ids=torch.tensor([[1, 2]]))
    EngramForCausalLM(config, folded)(input_ids=torch.tensor([[1, 2]]))
    # Ids that stand for themselves need no map: the model knows it.
    make()(input_ids=torch.tensor([[1, 2]]))


def test_equal_pairs_have_equal_rows(folded):
    model = make(vocabulary=folded)
    rows = []
    model.model.memories.register_forward_hook(lambda module, args, tickets: rows.append(tickets[1].rows))
    for pair in ([4, 8, 10], [5, 9, 11], [4, 8, 12]):
        model(input_ids=torch.tensor([pair]), use_cache=False)
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(dtype):
    """The weights follow it; rows of a table are read in float32 whatever it is."""
    rows = torch.arange(9)
    expected = make().memory_stack.items()[0][1].table.read(rows)
    torch.set_default_dtype(dtype)
    try:
        model = make(num_streams=2)
        ids = torch.tensor([[3, 4, 5, 6]])
        model.train()(input_ids=ids, labels=ids).loss.backward()
        assert model.dtype == dtype and model.eval().generate(ids, max_new_tokens=2).shape == (1, 6)
        found = model.memory_stack.items()[0][1].table.read(rows)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
