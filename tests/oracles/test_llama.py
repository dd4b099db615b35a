"""Our plain model against transformers' LlamaForCausalLM with copied weights: attention, norms, blocks, head.

Theirs rotates the two halves of a head, ours neighboring pairs: the rows of a head stand in another order.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from byrote import DLCMConfig, DLCMForCausalLM

HEADS, DIM = 4, 8
NAMES = {
    "experts": "mlp",
    "attention_norm": "input_layernorm",
    "experts_norm": "post_attention_layernorm",
    "attention": "self_attn",
}


def build(groups, tied):
    torch.manual_seed(0)
    ours = DLCMForCausalLM(
        DLCMConfig.from_preset(
            "dlcm-nano",
            vocab_size=64,
            hidden_size=32,
            num_encoder_layers=3,
            num_concept_layers=0,
            num_decoder_layers=0,
            num_attention_heads=HEADS,
            num_key_value_heads=groups,
            head_dim=DIM,
            intermediate_size=48,
            rope_theta=100.0,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
    )
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=HEADS,
            num_key_value_heads=groups,
            head_dim=DIM,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            theirs.get_parameter(their_name(name)).copy_(in_halves(name, parameter))
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))
    return ours, theirs


def their_name(name):
    parts = ["layers" if part == "encoder" else NAMES.get(part, part) for part in name.split(".")]
    return ".".join(parts)


def in_halves(name, weight):
    """Rows 0, 2, 4, ... of each head, then 1, 3, 5, ..."""
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    return weight.unflatten(0, (-1, DIM // 2, 2)).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_loss_and_gradients(groups, tied, assert_near):
    ours, theirs = build(groups, tied)
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[1, 6] = -100  # what padding predicts is nothing
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    our, their = (m(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels) for m in (ours, theirs))
    assert_near(our.logits[mask.bool()], their.logits[mask.bool()], "logits")
    assert_near(our.loss, their.loss, "loss")
    our.loss.backward()
    their.loss.backward()
    for name, parameter in ours.named_parameters():
        assert_near(in_halves(name, parameter.grad), theirs.get_parameter(their_name(name)).grad, name)


def test_greedy_generation():
    ours, theirs = build(2, False)
    ids = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.eval().generate(ids, **options), theirs.eval().generate(ids, **options))
