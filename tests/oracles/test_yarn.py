"""Our frequencies against transformers' YaRN, at DeepSeek's constants and at the edges of the ramp."""

import math

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
    yarn_apply_mscale,
)

from byrote.nn.rope import Yarn, frequencies, rotary, rotate, yarn_softmax_scale

CASES = {
    "deepseek-v3": (64, 10000.0, Yarn(40.0, 4096)),
    "deepseek-v2-lite": (64, 10000.0, Yarn(40.0, 4096, mscale=0.707)),
    "deepseek-v4.1": (64, 160000.0, Yarn(16.0, 65536)),
    "short": (12, 100.0, Yarn(8.0, 16, beta_fast=8.0)),
    "every wave stretched": (8, 10000.0, Yarn(4.0, 5, beta_fast=2.0)),
    "empty ramp": (8, 10000.0, Yarn(2.0, 64, beta_fast=1.001)),
    "no scaling": (16, 10000.0, Yarn(1.0, 64)),
}


def config_of(dim, theta, yarn):
    parameters = {"rope_type": "default", "rope_theta": theta}
    if yarn is not None:
        parameters = {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale,
        }
    length = int(yarn.original_length * yarn.factor) if yarn else 4096
    return DeepseekV3Config(qk_rope_head_dim=dim, rope_parameters=parameters, max_position_embeddings=length)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_frequencies_and_softmax_scale(case):
    dim, theta, yarn = case
    config = config_of(dim, theta, yarn)
    expected, cos_factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    assert cos_factor == 1.0  # DeepSeek leaves cos and sin alone
    torch.testing.assert_close(torch.tensor(frequencies(dim, theta, yarn)), expected, rtol=1e-6, atol=0)
    ours = yarn_softmax_scale(192, yarn)
    assert ours == pytest.approx(yarn_apply_mscale(config.rope_parameters, 192**-0.5), rel=1e-12)


@pytest.mark.parametrize("yarn", [None, Yarn(40.0, 4096)], ids=["rope", "yarn"])
def test_rotation(yarn, assert_near):
    torch.manual_seed(0)
    config = config_of(64, 10000.0, yarn)
    positions = torch.randint(0, 1000, (2, 7))
    query, key = torch.randn(2, 3, 7, 64), torch.randn(2, 1, 7, 64)
    turns = rotary(positions, 64, theta=10000.0, yarn=yarn)
    ours = [rotate(x, turns) for x in (query, key)]
    theirs = apply_rotary_pos_emb_interleave(query, key, *DeepseekV3RotaryEmbedding(config)(query, positions))
    for our, their in zip(ours, theirs, strict=True):
        # They return the pairs taken apart, first halves first; the scores do not see the difference.
        assert_near(torch.cat((our[..., 0::2], our[..., 1::2]), dim=-1), their)


def test_softmax_scale_formula():
    assert yarn_softmax_scale(64) == 0.125
    assert yarn_softmax_scale(192, Yarn(40.0, 4096)) == pytest.approx((0.1 * math.log(40) + 1) ** 2 / 192**0.5)
