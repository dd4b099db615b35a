"""Prediction modules of DeepSeek-V3 checkpoints: both ways, and drafts as transformers' MtpModel computes them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from byrote.interop.deepseek_v3 import load_deepseek_v3, save_deepseek_v3, to_deepseek_v3
from byrote.nn.rope import rotary
from tests.exactness.test_drafts import AliveOnly
from tests.interop.test_deepseek_v3 import make

MODULES = pytest.mark.parametrize("modules", [1, 2])
LAYERS = 4


def saved(folder, **overrides):
    model = make(**overrides)
    save_deepseek_v3(model, folder)
    return model


def edit(folder, change):
    """Apply `change` to the dict of the folder's tensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@MODULES
@pytest.mark.parametrize("settings", [{}, {"q_lora_rank": 24, "tie_word_embeddings": False}])
@torch.no_grad()
def test_module_logits_are_those_of_transformers(modules, settings, tmp_path):
    """Given the same h^{k-1}: transformers' own drafting gives its modules normalized ones."""
    ours = saved(tmp_path, num_nextn_predict_layers=modules, **settings)
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path).eval()
    # It knows its modules by the layer number of the one released model.
    theirs._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS + k}\." for k in range(modules)]
    oracle = MtpModel.from_pretrained(theirs).eval()

    ids = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(3))
    places = torch.arange(17)[None]
    streams = ours(input_ids=ids[:, :17], use_cache=False, output_streams=True).streams
    angles = rotary(places, ours.config.qk_rope_head_dim, theta=ours.config.rope_theta)
    for k, module in enumerate(ours.model.mtp):
        # Positions count from k + 1 there: only their differences matter.
        positions, next_ids = places + k + 1, ids[:, k + 1 : k + 18]
        expected = oracle.layers[k](
            oracle.embed_tokens(next_ids),
            streams.squeeze(2),
            position_embeddings=oracle.rotary_emb(streams, position_ids=positions),
            attention_mask=None,
            position_ids=positions,
            past_key_values=None,
        )
        embeddings = ours.model.embed_tokens(next_ids)
        hidden, output = module(embeddings, streams, angles, None, AliveOnly(17))
        logits, expected = ours.lm_head(hidden), oracle.shared_head(expected)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
        streams = output.streams


def test_names_and_shared_copies(tmp_path):
    ours = saved(tmp_path, num_nextn_predict_layers=2)
    written = load_file(tmp_path / "model.safetensors")
    for k in (LAYERS, LAYERS + 1):
        for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "self_attn.o_proj", "mlp.gate"):
            assert f"model.layers.{k}.{name}.weight" in written
        for name in ("embed_tokens", "shared_head.head"):
            assert torch.equal(written[f"model.layers.{k}.{name}.weight"], ours.lm_head.weight)
    assert written.keys() == to_deepseek_v3(ours).keys()


@MODULES
def test_import(modules, tmp_path):
    """The copies may be missing; others than the main model's are refused."""
    ours = saved(tmp_path, num_nextn_predict_layers=modules)
    edit(tmp_path, lambda tensors: tensors.pop(f"model.layers.{LAYERS}.embed_tokens.weight"))
    back = load_deepseek_v3(tmp_path)
    assert len(back.model.mtp) == modules
    for name, value in back.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    ids = torch.tensor([[5, 6, 7, 8]])
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(back.generate(ids, use_mtp=True, **settings), ours.generate(ids, **settings))

    edit(tmp_path, lambda tensors: tensors[f"model.layers.{LAYERS}.shared_head.head.weight"].mul_(2))
    with pytest.raises(ValueError, match=r"shared_head\.head.weight is not lm_head\.weight"):
        load_deepseek_v3(tmp_path)


def test_modules_without_experts_are_refused(tmp_path):
    model = make(num_nextn_predict_layers=1, first_k_dense_replace=LAYERS)
    with pytest.raises(ValueError, match="prediction modules of DeepSeek-V3 have experts"):
        save_deepseek_v3(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_import_where_the_modules_are_missing(tmp_path):
    """transformers drops them when it saves, and keeps their number in the config."""
    ours = saved(tmp_path / "ours", num_nextn_predict_layers=1)
    DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = load_deepseek_v3(tmp_path / "theirs")
    assert len(back.model.mtp) == 0 and back.config.num_nextn_predict_layers == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(back(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5)

    edit(tmp_path / "ours", lambda tensors: tensors.pop(f"model.layers.{LAYERS}.hnorm.weight"))
    with pytest.raises(ValueError, match="prediction modules are not all here"):
        load_deepseek_v3(tmp_path / "ours")
