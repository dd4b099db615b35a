"""Our experts against transformers' DeepseekV3MoE (sigmoid, correction bias) and DeepseekV2Moe (softmax)."""

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from byrote.nn.moe import DeepSeekMoE

SIZES = {"hidden_size": 32, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3}
NAMES = {
    "router.weight": "gate.weight",
    "experts.gate_up": "experts.gate_up_proj",
    "experts.down": "experts.down_proj",
    "shared.gate_proj.weight": "shared_experts.gate_proj.weight",
    "shared.up_proj.weight": "shared_experts.up_proj.weight",
    "shared.down_proj.weight": "shared_experts.down_proj.weight",
}


def copy_and_compare(ours, theirs, assert_near):
    theirs.config._experts_implementation = "eager"
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3)
            theirs.get_parameter(NAMES[name]).copy_(parameter)
    x, upstream = torch.randn(2, 25, 32), torch.randn(2, 25, 32)
    our_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    our_y, _ = ours(our_x)
    their_y = theirs(their_x)
    our_y.backward(upstream)
    their_y.backward(upstream)
    assert_near(our_y, their_y)
    assert_near(our_x.grad, their_x.grad, "x")
    assert len(list(theirs.parameters())) == len(NAMES)
    for name, parameter in ours.named_parameters():
        assert_near(parameter.grad, theirs.get_parameter(NAMES[name]).grad, name)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("num_shared", [1, 2])
def test_deepseek_v3(renormalize, n_group, topk_group, biased, num_shared, assert_near):
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SIZES,
        n_shared_experts=num_shared,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=renormalize,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3MoE(config)
    ours = DeepSeekMoE(
        32,
        16,
        8,
        3,
        16 * num_shared,
        renormalize=renormalize,
        route_scale=2.5,
        n_group=n_group,
        topk_group=topk_group,
    )
    if biased:
        ours.router.selection_bias.normal_()
        theirs.gate.e_score_correction_bias.copy_(ours.router.selection_bias)
    copy_and_compare(ours, theirs, assert_near)


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2)])
def test_deepseek_v2(n_group, topk_group, assert_near):
    torch.manual_seed(0)
    config = DeepseekV2Config(
        **SIZES,
        n_shared_experts=2,
        topk_method="greedy" if n_group == 1 else "group_limited_greedy",
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=16.0,
    )
    ours = DeepSeekMoE(
        32,
        16,
        8,
        3,
        32,
        scores="softmax",
        renormalize=False,
        route_scale=16.0,
        n_group=n_group,
        topk_group=topk_group,
    )
    copy_and_compare(ours, DeepseekV2Moe(config), assert_near)
