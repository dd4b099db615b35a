"""transformers' DeepseekV3ForCausalLM on the folders we write, and our model on the folders it writes."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from byrote import EngramConfig, EngramForCausalLM
from byrote.interop.deepseek_v3 import from_deepseek_v3, load_deepseek_v3, places, save_deepseek_v3, to_deepseek_v3
from byrote.interop.deepseek_v3_config import from_deepseek_v3_config, to_deepseek_v3_config

YARN = {"factor": 8.0, "original_length": 8, "beta_fast": 8.0, "beta_slow": 1.0, "mscale": 0.7}
SHAPES = {
    "plain": {},
    "query latent, untied": {"q_lora_rank": 24, "tie_word_embeddings": False},
    "groups, two shared experts": {"n_group": 4, "topk_group": 2, "shared_expert_intermediate_size": 64},
    "route scale, not renormalized": {"routed_scaling_factor": 2.5, "norm_topk_prob": False},
    "yarn": {"yarn": YARN, "q_lora_rank": 24, "rope_theta": 100.0},
    "yarn without temperature": {"yarn": {**YARN, "mscale": 0.0}},
    "no shared expert": {"shared_expert_intermediate_size": 0},
    "all dense": {"first_k_dense_replace": 4},
    "all but the last dense, a module": {"first_k_dense_replace": 3, "num_nextn_predict_layers": 1},
    "two modules, untied": {"num_nextn_predict_layers": 2, "tie_word_embeddings": False, "q_lora_rank": 24},
    "no dense": {"first_k_dense_replace": 0},
}


def perturb(model):
    """Numbers that matter everywhere: gains and selection biases too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "bias" in name or "norm" in name:
                value += 0.3 * torch.randn(value.shape, generator=generator)
            elif value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.15)
    model.tie_weights()
    return model.eval()


def make(**overrides):
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "memory_layers": [], "num_hidden_layers": 4, **overrides}
    return perturb(EngramForCausalLM(EngramConfig.from_preset("nano", **settings)))


def make_theirs(**overrides):
    torch.manual_seed(0)
    shape = make().config
    settings = to_deepseek_v3_config(shape).to_dict() | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    return perturb(DeepseekV3ForCausalLM(DeepseekV3Config(**settings | overrides)))


@torch.no_grad()
def assert_same(ours, theirs):
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(3))
    expected = theirs(input_ids=ids, use_cache=False).logits
    got = ours(input_ids=ids, use_cache=False).logits
    error = float((got - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert error <= 1e-5, f"logits are off by {error:.1e}"
    assert expected.std() > 0.1
    greedy = [
        model.generate(ids[:, :5], attention_mask=torch.ones_like(ids[:, :5]), max_new_tokens=12, do_sample=False)
        for model in (ours, theirs)
    ]
    assert torch.equal(*greedy)


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_export_and_back(overrides, tmp_path):
    model = make(**overrides)
    save_deepseek_v3(model, tmp_path)
    theirs, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    empty = {name for name in info["missing_keys"] if theirs.get_parameter(name).numel()}
    # It looks past prediction modules only at layer 61.
    unexpected = [name for name in info["unexpected_keys"] if not re.match(r"model\.layers\.[45]\.", name)]
    assert not empty and not unexpected and not info["mismatched_keys"]
    assert_same(model, theirs.eval())
    back = load_deepseek_v3(tmp_path)
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, value in back.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for field, value in model.config.to_dict().items():
        if field not in ("architectures", "dtype", "yarn") and not field.startswith("memory_"):
            assert back.config.to_dict()[field] == value, field
    assert back.config.yarn_parameters == model.config.yarn_parameters


THEIRS = {
    "plain": {},
    "query latent, tied": {"q_lora_rank": 24, "tie_word_embeddings": True},
    "untied, groups": {"tie_word_embeddings": False, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 8.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 64,
    },
    "ignored": {"attention_dropout": 0.1, "output_router_logits": False, "pretraining_tp": 2},
}


@pytest.mark.parametrize("overrides", THEIRS.values(), ids=THEIRS)
def test_import(overrides, tmp_path):
    theirs = make_theirs(**overrides)
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(load_deepseek_v3(tmp_path), theirs)


def test_import_of_a_config_in_the_words_of_the_release(tmp_path):
    """rope_scaling and rope_theta, and the fields of the remote code; what lies behind the modules is left out."""
    theirs = make_theirs(**THEIRS["yarn"])
    theirs.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    rope = content.pop("rope_parameters")
    content["rope_theta"], content["rope_scaling"] = rope.pop("rope_theta"), {"type": rope.pop("rope_type"), **rope}
    content |= {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "aux_loss_alpha": 0.001}
    (tmp_path / "config.json").write_text(json.dumps(content))
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {
        "model.layers.3.eh_proj.weight": torch.zeros(4, 8),  # behind the one module of the config
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(load_deepseek_v3(tmp_path), theirs)


def test_import_of_stacked_experts(tmp_path):
    theirs = make_theirs()
    with_modules = EngramForCausalLM(from_deepseek_v3_config(theirs.config))
    with pytest.raises(ValueError, match="set num_nextn_predict_layers to 0"):
        from_deepseek_v3(with_modules, theirs.state_dict().items())
    theirs.config.num_nextn_predict_layers = 0
    model = EngramForCausalLM(from_deepseek_v3_config(theirs.config))
    assert any(name.endswith("experts.gate_up_proj") for name in theirs.state_dict())
    from_deepseek_v3(model, theirs.state_dict().items())
    assert_same(model.eval(), theirs)


def test_shards_and_names(tmp_path):
    model = make(q_lora_rank=24)
    save_deepseek_v3(model, tmp_path, max_shard_bytes=60_000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 70_000 for path in files)
    names = []
    for path in files:
        with safe_open(path, framework="pt") as shard:
            names += shard.keys()
    assert sorted(names) == sorted(places(model.config))
    for name in (
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    ):
        assert name in names
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    with pytest.raises(ValueError, match="holds weights already"):
        save_deepseek_v3(model, tmp_path)
    files[1].unlink()
    with pytest.raises(ValueError, match=f"{files[1].name} cannot be read"):
        load_deepseek_v3(tmp_path)


def test_nothing_is_copied_before_it_is_written():
    model = make()
    exported = to_deepseek_v3(model)
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in exported.values()} <= storages
    assert sum(tensor.numel() for tensor in exported.values()) == sum(
        tensor.numel() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    )


def test_dtypes(tmp_path):
    """The selection bias stays in float32, as in released checkpoints."""
    model = make().to(torch.bfloat16)
    save_deepseek_v3(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kinds = {name.rsplit(".", 1)[-1]: tensor.dtype for name, tensor in weights.items()}
    assert kinds == {"weight": torch.bfloat16, "e_score_correction_bias": torch.float32}
    back = load_deepseek_v3(tmp_path)
    assert back.dtype == torch.bfloat16 and torch.equal(
        back.model.layers[1].experts.router.selection_bias, model.model.layers[1].experts.router.selection_bias
    )
    assert load_deepseek_v3(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_model_with_memories(tmp_path):
    model = make(memory_layers=[1])
    with pytest.raises(ValueError, match="backbone_only=True"):
        save_deepseek_v3(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    save_deepseek_v3(model, tmp_path / "x", backbone_only=True)
    alone = make(memory_layers=[])
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if k in alone.state_dict()})
    assert_same(alone, DeepseekV3ForCausalLM.from_pretrained(tmp_path / "x").eval())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"shared_expert_intermediate_size": 40}, "no multiple of moe_intermediate_size=32"),
        ({"scoring_func": "softmax"}, "knows 'sigmoid' only"),
        ({"rms_norm_eps": 1e-5}, "agree at 1e-06 only"),
        ({"n_group": 8, "topk_group": 2}, "needs at least two"),
    ],
)
def test_export_refuses(overrides, message):
    with pytest.raises(ValueError, match=message):
        to_deepseek_v3(make(**overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"topk_method": "greedy"}, "topk_method='greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2"),
        ({"quantization_config": {"quant_method": "fp8"}}, "convert them to bfloat16"),
        ({"rms_norm_eps": 1e-5}, "agree at 1e-06 only"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": {**THEIRS["yarn"]["rope_parameters"], "mscale": 0.5}}, "leaves cos and sin alone"),
        ({"rope_parameters": {**THEIRS["yarn"]["rope_parameters"], "truncate": False}}, "truncate"),
    ],
)
def test_import_refuses(overrides, message):
    settings = to_deepseek_v3_config(make().config).to_dict()
    with pytest.raises(ValueError, match=message):
        from_deepseek_v3_config(DeepseekV3Config(**settings | overrides))


def test_import_refuses_weights_that_do_not_fit(tmp_path):
    model = make()
    tensors = {name: tensor.clone() for name, tensor in to_deepseek_v3(model).items()}
    gone = dict(tensors)
    del gone["model.layers.1.mlp.experts.3.up_proj.weight"]
    for content, message in (
        (gone, "missing"),
        ({**tensors, "model.layers.1.mlp.gate.bias": torch.zeros(1)}, "is no tensor of a DeepSeek-V3"),
        ({**tensors, "model.norm.weight": torch.zeros(3)}, "model.norm.weight has shape"),
        ({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1, **tensors}, "is not the embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            from_deepseek_v3(model, content.items())
    from_deepseek_v3(model, {"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors}.items())
    with pytest.raises(ValueError, match=r"holds no config.json"):
        load_deepseek_v3(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type='llama'"):
        load_deepseek_v3(tmp_path)
    (tmp_path / "config.json").write_text(to_deepseek_v3_config(model.config).to_json_string())
    with pytest.raises(ValueError, match=r"neither model.safetensors.index.json nor model.safetensors"):
        load_deepseek_v3(tmp_path)
