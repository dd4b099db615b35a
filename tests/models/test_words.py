"""Words in a config that nobody would read are refused with the nearest name; what says the same is taken."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from byrote import DLCMConfig, EngramConfig, EngramForCausalLM
from tests.models.conftest import logits, make

YARN = {"factor": 4.0, "original_length": 64, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0}
ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

REFUSED = {
    "memory_layer": ([0, 1], "did you mean memory_layers"),
    "memory_table_size": ([9, 9], "did you mean memory_table_sizes"),
    "nosuch": (3, "is no field of the config: there are"),
    "rms_norm_epsilon": (1.0, "did you mean rms_norm_eps"),
    "tie_embeddings": (False, "did you mean tie_word_embeddings"),
    "hc_mult": (4, "did you mean num_streams"),
    "engram_layer_ids": ([0], "did you mean memory_layers"),
    "aux_loss_alpha": (5.0, "did you mean balance_loss_alpha"),
    "d_model": (32, "did you mean hidden_size"),
    "attention_bias": (True, "computes False only"),
    "attention_dropout": (0.5, "computes 0 only"),
    "hidden_act": ("gelu", "computes 'silu' or 'swish' only"),
    "sliding_window": (4, "computes None only"),
    "topk_method": ("greedy", "computes 'noaux_tc' only"),
    "moe_layer_freq": (2, "computes 1 only"),
    "per_layer_config": ({0: {"hidden_size": 3}}, "computes None only"),
    "temperature": (0.5, "model.generation_config"),
    "max_new_tokens": (5, "model.generation_config"),
    "model_type": ("llama", "follows from other fields"),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, "rope_type='linear'"),
    "rope_parameters": ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
}


@pytest.mark.parametrize("kind", [EngramConfig, DLCMConfig])
@pytest.mark.parametrize(("word", "value", "remedy"), [(word, *rest) for word, rest in REFUSED.items()], ids=REFUSED)
def test_refused(tmp_path, kind, word, value, remedy):
    name = "nano" if kind is EngramConfig else "dlcm-nano"
    with pytest.raises(ValueError) as error:
        kind.from_preset(name, **{word: value})
    assert remedy in str(error.value)
    if "there are" in remedy:
        return
    kind.from_preset(name).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), word: value}))
    if word != "model_type":
        with pytest.raises(ValueError, match=word if "rope" not in word else "rope"):
            AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500}}, {"rope_theta": 500.0}),
        ({"rope_scaling": {**ROPE, "rope_theta": 7.0}}, {"rope_theta": 7.0, "yarn": YARN}),
        ({"rope_scaling": None, "rope_theta": 7}, {"rope_theta": 7}),
        ({"attention_dropout": 0.0, "hidden_act": "silu", "sliding_window": None, "attention_bias": False}, {}),
        ({"n_shared_experts": 1, "num_key_value_heads": 4, "head_dim": 8, "qk_head_dim": 24}, {}),
    ],
)
def test_what_says_the_same(words, meant):
    config = EngramConfig.from_preset("nano", **words)
    assert config.to_dict() == EngramConfig.from_preset("nano", **meant).to_dict()
    assert not set(words) - set(meant) & set(config.to_dict())


def test_what_follows_from_other_fields():
    for word, value in {"num_key_value_heads": 2, "head_dim": 64, "n_shared_experts": 4}.items():
        with pytest.raises(ValueError, match=f"{word}={value}: it follows from other fields"):
            EngramConfig.from_preset("nano", **{word: value})
    with pytest.raises(ValueError, match="num_hidden_layers=3: it follows from other fields and is 2"):
        DLCMConfig.from_preset("dlcm-nano", num_hidden_layers=3)
    with pytest.raises(ValueError, match="a DLCMConfig has no yarn"):
        DLCMConfig.from_preset("dlcm-nano", rope_scaling=ROPE)


WRONG = {
    "a number in words": ({"hidden_size": "64"}, TypeError, "'hidden_size' expected int, got str .value: '64'"),
    "Python's False in words": ({"memory_gate": "False"}, TypeError, "'memory_gate' expected bool"),
    "a whole number in parts": ({"num_hidden_layers": 4.0}, TypeError, "'num_hidden_layers' expected int"),
    "a negative special token": ({"pad_token_id": -1}, ValueError, "pad_token_id=-1: a token id below"),
    "one of several": ({"eos_token_id": [1, -2]}, ValueError, "eos_token_id=.1, -2.: a token id below"),
    "a negative rate": ({"router_bias_update_rate": -0.1}, ValueError, "router_bias_update_rate=-0.1: a finite"),
    "no number": ({"balance_loss_alpha": float("nan")}, ValueError, "balance_loss_alpha=nan: a finite"),
    "no positions": ({"max_position_embeddings": 0}, ValueError, "max_position_embeddings=0: a finite"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_values(change, error, message):
    with pytest.raises(error, match=message):
        EngramConfig.from_preset("nano", **change)


def test_what_is_set_later_is_checked_by_the_model():
    config = EngramConfig.from_preset("nano")
    config.memory_table_sizes = [503, 997]
    with pytest.raises(ValueError, match="memory_table_sizes"):
        EngramForCausalLM(config)
    config = EngramConfig()
    config.memory_layers = [1]
    assert EngramForCausalLM(config).memory_stack is not None


def test_fields_given_beside_a_folder(tmp_path, ids):
    model = make().eval()
    model.save_pretrained(tmp_path)
    for loader in (EngramForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"memory_table_sizes=\[211, 223\] would give"):
            loader.from_pretrained(tmp_path, memory_table_sizes=[211, 223])
        with pytest.raises(ValueError, match="yran is no field of the config: did you mean yarn"):
            loader.from_pretrained(tmp_path, yran=YARN)
        with pytest.raises(ValueError, match=r"attention_dropout=0\.5"):
            loader.from_pretrained(tmp_path, attention_dropout=0.5)
        read = loader.from_pretrained(tmp_path, rope_theta=500, rope_scaling=ROPE).eval()
        assert (read.config.rope_theta, read.config.yarn) == (500, YARN)
        assert (logits(read, ids) - logits(model, ids)).abs().max() > 1e-4


def test_notes_of_tools_survive(tmp_path):
    """What others set on a config, or write into its file, is no word of ours, and comes back."""
    config = EngramConfig.from_preset("nano", num_labels=3, attn_implementation="eager", torch_dtype="bfloat16")
    config.unsloth_version = "1"
    config.update({"use_cache": False})
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert (read.unsloth_version, read.num_labels, read.dtype, read.use_cache) == ("1", 3, torch.bfloat16, False)
    unused = EngramConfig.from_pretrained(tmp_path, hidden_size=32, strange=1, return_unused_kwargs=True)
    assert unused[0].hidden_size == 32 and unused[1] == {"strange": 1}
