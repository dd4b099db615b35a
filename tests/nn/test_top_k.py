"""The ids of the largest few, against sorting in Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.nn.router import top_k
from byrote.ops.dispatch import plain_twins

SCORES = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, 1.0, -math.inf])


@settings(deadline=None)  # the loop is compiled at first use
@given(st.lists(SCORES, min_size=1, max_size=20), st.data())
def test_by_sorting(row, data):
    k = data.draw(st.integers(1, len(row)))
    ids = top_k(torch.tensor([row, row[::-1]]), k).tolist()
    for got, scores in zip(ids, (row, row[::-1]), strict=True):
        assert got == sorted(range(len(row)), key=lambda i: (-scores[i], i))[:k]


@pytest.mark.parametrize("shape", [(300, 64), (2, 5, 7), (0, 8)])
def test_twins(shape):
    scores = torch.randn(shape)
    with plain_twins():
        expected = top_k(scores, 4)
    assert torch.equal(top_k(scores, 4), expected)
    assert torch.equal(top_k(scores.double(), 4), expected)
    apart = torch.stack([scores, scores], dim=-1)[..., 0]
    assert torch.equal(top_k(apart, 4), expected)


def test_what_is_not_a_number_is_chosen_last():
    nan = math.nan
    assert top_k(torch.tensor([[nan, 1.0, nan, 3.0]]), 3).tolist() == [[3, 1, 0]]
    assert top_k(torch.full((1, 6), nan), 2).tolist() == [[0, 1]]  # and still names experts that there are
