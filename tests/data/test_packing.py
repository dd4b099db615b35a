"""Every token exactly once, positions and labels right, any rank's rows, and resuming by counting."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.data.loader import Loader
from byrote.data.packing import IGNORED, Packer, Tokens, predicted, validation_batches


def corpus(lengths: list[int]) -> Tokens:
    """Token i is its own place, so that a batch tells where its tokens come from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(np.arange(offsets[-1], dtype=np.int32), offsets)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


documents = st.lists(st.integers(2, 30), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(documents, st.integers(1, 4), st.integers(2, 17), st.integers(0, 3))
def test_an_epoch_holds_every_token_once_and_positions_restart(lengths, batch_size, length, seed):
    data = corpus(lengths)
    packer = Packer(data, batch_size, length, seed)
    steps = -(-2 * len(data) // (batch_size * length))
    batches = [packer.batch(step) for step in range(steps)]
    stream = torch.cat([batch["input_ids"].flatten() for batch in batches])
    for epoch in range(2):
        assert sorted(stream[epoch * len(data) : (epoch + 1) * len(data)].tolist()) == list(range(len(data)))
    begins = set(data.offsets[:-1].tolist())
    for batch in batches:
        rows = zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), batch["labels"].tolist(), strict=True)
        for ids, positions, labels in rows:
            for t, (token, position, label) in enumerate(zip(ids, positions, labels, strict=True)):
                fresh = t == 0 or token in begins
                assert position == (0 if fresh else positions[t - 1] + 1)
                assert fresh or token == ids[t - 1] + 1
                assert label == (IGNORED if token in begins else token)


@settings(deadline=None, max_examples=40)
@given(documents, st.sampled_from([2, 4]), st.integers(2, 9))
def test_ranks_share_the_rows_of_the_one_batch(lengths, batch_size, length):
    data = corpus(lengths)
    whole, parts = (
        Packer(data, batch_size, length, 7),
        [Packer(data, batch_size, length, 7, r, 2) for r in (0, 1)],
    )
    for step in (0, 3):
        batch = whole.batch(step)
        for rank, part in enumerate(parts):
            assert same({key: value[rank::2] for key, value in batch.items()}, part.batch(step))


@settings(deadline=None, max_examples=60)
@given(documents, st.integers(1, 4), st.integers(2, 17))
def test_validation_predicts_every_token_once(lengths, batch_size, length):
    data = corpus(lengths)
    seen, count = [], 0
    for batch in validation_batches(data, batch_size, length):
        labels = batch["labels"][:, 1:]
        seen.extend(labels[labels != IGNORED].tolist())
        count += predicted(batch)
        assert batch.keys() == {"input_ids", "position_ids", "labels"}
        assert batch["input_ids"].shape[1] == length or len(batch["input_ids"]) == 1
        fresh = batch["position_ids"][:, 1:] == 0
        assert torch.equal(fresh, torch.isin(batch["input_ids"][:, 1:], torch.from_numpy(data.offsets)))
    begins = set(data.offsets[:-1].tolist())
    assert sorted(seen) == [i for i in range(len(data)) if i not in begins]
    assert count == data.predicted


def test_epochs_are_shuffled_by_seed():
    data = corpus([5] * 20)
    orders = [
        Packer(data, 20, 5, seed).batch(step)["input_ids"][:, 0].tolist() for seed, step in [(0, 0), (0, 1), (1, 0)]
    ]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    assert Packer(data, 20, 5, 0).epoch(3) == 3


@pytest.mark.parametrize("ahead", [0, 3])
def test_loader_resumes_where_batches_were_taken(ahead):
    data = corpus([7, 11, 4, 20])
    straight = [Packer(data, 2, 6, 0).batch(step) for step in range(8)]
    loader = Loader(Packer(data, 2, 6, 0), ahead)
    for step in range(5):
        assert same(next(loader), straight[step])
    time.sleep(0.05)  # let the thread run ahead of what is taken
    state = loader.state_dict()
    loader.close()
    resumed = Loader(Packer(data, 2, 6, 0), ahead)
    resumed.load_state_dict(state)
    for step in range(5, 8):
        assert same(next(resumed), straight[step])
    resumed.load_state_dict(state)  # a running loader can be wound back
    assert same(next(resumed), straight[5])
    resumed.close()


def test_loader_and_packer_errors():
    data = corpus([7, 11])
    state = Loader(Packer(data, 2, 6, 0)).state_dict()
    with pytest.raises(ValueError, match="read another stream"):
        Loader(Packer(data, 2, 6, 1)).load_state_dict(state)
    with pytest.raises(ValueError, match="not divisible by the 2 processes"):
        Packer(data, 3, 6, 0, world=2)
    broken = Loader(Packer(Tokens(data.tokens[:3], data.offsets), 2, 6, 0))
    broken.packer.batch = lambda step: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        next(broken)
    broken.close()
