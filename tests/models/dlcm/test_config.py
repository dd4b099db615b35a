"""What a config cannot mean is refused in words; the presets have the paper's counts."""

import pytest
import torch

from byrote import DLCMConfig, DLCMForCausalLM
from byrote.models.counts import block_macs
from byrote.models.dlcm.presets import PRESETS
from tests.models.dlcm.conftest import FORMS

DEEPSEEK = FORMS["deepseek"]
REFUSED = {
    "R of one": ({"compression_ratio": 1.0}, r"compression_ratio=1.0: tokens per concept, above 1"),
    "R below one": ({"compression_ratio": 0.25}, "compression_ratio=0.25"),
    "R that is none": ({"compression_ratio": float("nan")}, "compression_ratio=nan"),
    "groups of heads": ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads=4: must divide"),
    "groups of concept heads": ({"num_concept_key_value_heads": 3}, "num_concept_key_value_heads=3: must divide"),
    "no groups": ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0: at least 1"),
    "no concept heads": ({"num_concept_heads": 0}, "num_concept_heads=0: at least 1"),
    "odd heads": ({"head_dim": 7}, "head_dim=7: .*even"),
    "odd rotary": ({**DEEPSEEK, "qk_rope_head_dim": 5}, "even"),
    "no width": ({"hidden_size": 0}, "hidden_size=0: at least 1"),
    "no concept width": ({"concept_size": 0}, "concept_size=0: at least 1"),
    "no feed-forward": ({"intermediate_size": 0}, "intermediate_size=0: at least 1"),
    "no concept feed-forward": ({"concept_intermediate_size": 0}, "concept_intermediate_size=0: at least 1"),
    "no encoder": ({"num_encoder_layers": 0}, "num_encoder_layers=0: at least 1"),
    "negative layers": ({"num_concept_layers": -1}, "num_concept_layers=-1: 0 or more"),
    "a decoder alone": ({"num_concept_layers": 0}, "num_decoder_layers=1: 0 without concept layers"),
    "mode": ({"boundary_mode": "learned"}, "boundary_mode='learned': must be 'decoupled', 'e2e' or 'rule'"),
    "convention": ({"boundary_convention": "shut"}, r"boundary_convention='shut': must be one of \('close', 'open'"),
    "smoothing": ({"concept_smoothing": "conv"}, "concept_smoothing='conv': must be 'ema' or 'none'"),
    "weighting": ({"concept_weighting": "equal"}, r"concept_weighting='equal': must be one of \('replicated', 'unif"),
    "kernel": ({"concept_kernel": "flash"}, r"concept_kernel='flash': must be one of \('dense', 'sdpa'"),
    "kernel and weighting": (
        {"concept_kernel": "varlen", "concept_weighting": "uniform"},
        "concept_kernel='varlen': is of concept_weighting='replicated'",
    ),
    "weight": ({"boundary_weight": -0.1}, "boundary_weight=-0.1: 0 or more"),
    "temperature": ({"boundary_temperature": 0.5}, "boundary_temperature=0.5: at least 1"),
    "threshold of zero": ({"boundary_threshold": 0.0}, "boundary_threshold=0.0: between 0 and 1"),
    "threshold of one": ({"boundary_threshold": 1.0}, "boundary_threshold=1.0: between 0 and 1"),
    "boundary size": ({"boundary_size": 0}, "boundary_size=0: at least 1"),
    "base width": ({"mup_base_width": 0}, "mup_base_width=0: a width, or None"),
    "streams": ({"num_streams": 0}, "num_streams=0: at least 1"),
    "connection": ({"stream_connection": "plain"}, "stream_connection='plain': must be"),
    "memories in the decoder": ({"memory_layers": [1]}, r"memory_layers=\[1\]: ascending block numbers in 0..0"),
    "more choices than experts": ({**DEEPSEEK, "num_experts_per_tok": 5}, "num_experts_per_tok=5: at most"),
    "streams alone": ({"num_streams": 4}, "num_streams without the rest: DeepSeek's form has all of"),
    "latents alone": ({"kv_lora_rank": 16}, "kv_lora_rank without the rest"),
    "experts alone": ({"n_routed_experts": 4}, "n_routed_experts without the rest"),
    "no memories": ({**DEEPSEEK, "memory_layers": []}, "without the rest: .*memory_layers"),
    "no streams": ({**DEEPSEEK, "num_streams": 1}, "kv_lora_rank, n_routed_experts without the rest"),
    "no concepts": ({**DEEPSEEK, "num_concept_layers": 0, "num_decoder_layers": 0}, "and concept layers"),
    "preset": ({"name": "dlcm-7b"}, "preset must be one of .*'dlcm-2.3b'.*got 'dlcm-7b'"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DLCMConfig.from_preset(**{"name": "dlcm-nano", **change})


@pytest.mark.parametrize("change", FORMS.values(), ids=FORMS)
def test_forms_are_not(change):
    assert DLCMConfig.from_preset("dlcm-nano", **change).compression_ratio == 4


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build(preset):
    config = DLCMConfig.from_preset(preset)
    with torch.device("meta"):
        model = DLCMForCausalLM(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert bool(config.num_concept_layers) == preset.startswith("dlcm")


def parts(preset):
    """Parameters of embeddings and of the matrices of all blocks."""
    with torch.device("meta"):
        model = DLCMForCausalLM(DLCMConfig.from_preset(preset))
    embeddings = model.model.embed_tokens.weight.numel() + model.lm_head.weight.numel()
    layers = [*model.model.encoder, *model.model.decoder]
    layers += [] if model.model.concepts is None else model.model.concepts.layers
    return embeddings, sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() == 2)


def test_the_papers_counts():
    """Table 3: 2.3 B and 1.3 B parameters, and at R = 4 the same multiply-accumulates a token, to the last one."""
    for preset, billions in (("dlcm-2.3b", 2.321), ("llama-1.3b", 1.302)):
        assert sum(parts(preset)) / 1e9 == pytest.approx(billions, abs=5e-4)
    ours, theirs = (block_macs(DLCMConfig.from_preset(preset)) for preset in ("dlcm-2.3b", "llama-1.3b"))
    assert ours == theirs == 905_969_664
    assert block_macs(DLCMConfig.from_preset("dlcm-2.3b", compression_ratio=2.0)) > theirs
