"""Our latent attention against transformers' DeepseekV3Attention with copied weights."""

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from byrote.nn.mla import MLA
from byrote.nn.rope import Yarn, rotary, yarn_softmax_scale

YARN = Yarn(factor=8.0, original_length=16, beta_fast=8.0, beta_slow=1.0, mscale=0.707)
NAMES = {"kv_a_proj": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm", "q_a_norm": "q_a_layernorm"}


def build(q_lora_rank, yarn):
    rope = {"rope_type": "default", "rope_theta": 100.0}
    if yarn:
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale,
        }
    config = DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=12,
        v_head_dim=10,
        rope_parameters=rope,
        rope_interleave=True,
        max_position_embeddings=128,
        attn_implementation="eager",
    )
    scale = yarn_softmax_scale(20, yarn)
    ours = MLA(32, 4, q_lora_rank, 16, 8, 12, 10, eps=1e-6, softmax_scale=scale)
    theirs = DeepseekV3Attention(config, layer_idx=0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
            theirs.get_parameter(their_name(name)).copy_(parameter)
    return ours, theirs, DeepseekV3RotaryEmbedding(config)


def their_name(name):
    module, weight = name.split(".")
    return f"{NAMES.get(module, module)}.{weight}"


@pytest.mark.parametrize("yarn", [None, YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize("q_lora_rank", [None, 12])
@pytest.mark.parametrize("absorb", [False, True])
def test_values_and_gradients(q_lora_rank, yarn, absorb, assert_near):
    torch.manual_seed(0)
    ours, theirs, their_rotary = build(q_lora_rank, yarn)
    ours.absorb = absorb
    assert ours.softmax_scale == pytest.approx(theirs.scaling, rel=1e-12)

    x = torch.randn(2, 24, 32)
    positions = torch.stack((torch.arange(24), torch.arange(24) + 5))
    visible = torch.ones(24, 24).tril().bool()
    visible = torch.stack((visible, visible & (torch.arange(24) >= 3) | torch.eye(24).bool()))[:, None]
    upstream = torch.randn(2, 24, 32)

    our_x = x.clone().requires_grad_()
    our_y = ours(our_x, rotary(positions, 12, theta=100.0, yarn=yarn), visible)
    our_y.backward(upstream)
    their_x = x.clone().requires_grad_()
    bias = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    their_y, _ = theirs(their_x, their_rotary(x, positions), bias)
    their_y.backward(upstream)

    assert_near(our_y, their_y)
    assert_near(our_x.grad, their_x.grad, "x")
    for name, parameter in ours.named_parameters():
        assert_near(parameter.grad, theirs.get_parameter(their_name(name)).grad, name)
