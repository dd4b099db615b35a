import pytest
import torch

from byrote.nn.rope import Yarn, frequencies, rotary, rotate


def test_turns_neighboring_pairs():
    turns = rotary(torch.tensor([[3]]), 4, theta=100.0)
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4), turns).flatten()
    angles = torch.tensor([3.0, 0.3])  # theta^0 and theta^(-1/2)
    torch.testing.assert_close(turned[:2], torch.stack((angles[0].cos(), angles[0].sin())))
    torch.testing.assert_close(turned[2:], torch.stack((-angles[1].sin(), angles[1].cos())))


@pytest.mark.parametrize("yarn", [None, Yarn(8.0, 16)])
def test_scores_see_only_the_distance(yarn):
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 6, 16), torch.randn(1, 1, 6, 16)
    scores = []
    for shift in (0, 50):
        angles = rotary(torch.arange(6)[None] + shift, 16, yarn=yarn)
        scores.append(rotate(query, angles) @ rotate(key, angles).transpose(-1, -2))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-5, rtol=1e-5)


def test_yarn_keeps_fast_waves_and_stretches_slow_ones():
    plain = torch.tensor(frequencies(64, 10000.0, None))
    stretched = torch.tensor(frequencies(64, 10000.0, Yarn(40.0, 4096)))
    assert torch.equal(plain[:10], stretched[:10])
    torch.testing.assert_close(plain[-8:] / 40.0, stretched[-8:])
    assert (stretched.diff() < 0).all()


def test_values_are_real_under_a_meta_device():
    frequencies.cache_clear()
    with torch.device("meta"):
        rates = frequencies(8, 10000.0, None)
    assert rates[0] == 1.0
    turns = rotary(torch.zeros(1, 3, dtype=torch.long, device="meta"), 8)
    assert turns.is_meta and turns.shape == (1, 3, 4)


def test_half_precision_is_turned_in_float32():
    x = torch.randn(1, 2, 3, 8)
    angles = rotary(torch.arange(3)[None] + 1000, 8)
    half = rotate(x.bfloat16(), angles)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, rotate(x.bfloat16().float(), angles).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"factor": 0.5, "original_length": 64}, "factor=0.5"),
        ({"factor": 2.0, "original_length": 0}, "original_length=0"),
        ({"factor": 2.0, "original_length": 64, "beta_fast": 1.0}, "beta_fast=1.0"),
    ],
)
def test_bad_yarn(arguments, field):
    with pytest.raises(ValueError, match=f"{field}.*give"):
        Yarn(**arguments)


def test_odd_dimension():
    with pytest.raises(ValueError, match=r"dim=7.*give an even number"):
        rotary(torch.zeros(1, 1), 7)


def test_a_single_token_at_an_odd_place_in_memory():
    x = torch.randn(1, 1, 1, 7)
    apart = x[..., 3:]
    assert apart.is_contiguous() and apart.storage_offset() % 2
    turns = rotary(torch.tensor([[5]]), 4)
    assert torch.equal(rotate(apart, turns), rotate(apart.clone(), turns))
