"""A memory fused as a sublayer of its own (memory_fusion "single") is as exact as one that adds to every stream."""

import pytest
import torch

from tests.exactness.conftest import build
from tests.exactness.test_boundaries import test_packed_documents_with_a_cache as packed_documents_with_a_cache
from tests.exactness.test_boundaries import test_padded_prefill_and_decode as padded_prefill_and_decode
from tests.exactness.test_cached import assert_same, random_sizes
from tests.exactness.test_cached import test_rollback as rollback


@pytest.fixture
def model():
    return build(num_streams=4, memory_fusion="single")


def test_decode_in_any_chunks(model, ids):
    assert_same(model, ids, [1] * 24)
    assert_same(model, ids, random_sizes(24, 1))


def test_boundaries(model, ids):
    for side in ("left", "right"):
        padded_prefill_and_decode(model, ids, side)
    packed_documents_with_a_cache(model, ids, 1)


def test_rollback(model, ids):
    rollback(model, ids, 4)


def test_one_stream_knows_one_fusion(ids):
    """With the plain residual both fusions are one model."""
    single, streams = build(memory_fusion="single"), build()
    streams.load_state_dict(single.state_dict())
    with torch.no_grad():
        assert torch.equal(single(input_ids=ids).logits, streams(input_ids=ids).logits)
