"""Compiled loops = their plain twins, to the bit; and what would read beyond an end is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.tables import records as gather
from byrote.tables.codecs import CODECS

counts = st.integers(0, 100)  # on both sides of how far ahead the loops look
seeds = st.integers(0, 2**31)


def ids_of(rows, count, seed):
    return torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), count=counts, seed=seeds)
def test_gather(size, count, seed):
    records = torch.randint(0, 256, (50, size), dtype=torch.uint8)
    ids, (fast, plain) = ids_of(50, count, seed), torch.zeros(2, count, size, dtype=torch.uint8)
    assert gather.gather(records, ids, fast) is fast
    assert torch.equal(fast, gather.gather_twin(records, ids, plain))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), count=st.integers(0, 50), seed=seeds)
def test_scatter(size, count, seed):
    fast = torch.randint(0, 256, (50, size), dtype=torch.uint8)
    plain, new = fast.clone(), torch.randint(0, 256, (count, size), dtype=torch.uint8)
    ids = torch.randperm(50, generator=torch.Generator().manual_seed(seed))[:count]
    gather.scatter(fast, ids, new)
    gather.scatter_twin(plain, ids, new)
    assert torch.equal(fast, plain)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), count=counts, seed=seeds)
def test_copy(size, count, seed):
    memory = torch.randint(0, 256, (2000,), dtype=torch.uint8)
    addresses = memory.data_ptr() + ids_of(2000 - size + 1, count, seed)
    fast, plain = torch.zeros(2, count, size, dtype=torch.uint8)
    gather.copy(addresses, fast)
    gather.copy_twin(addresses, plain)
    assert torch.equal(fast, plain)


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 130), count=counts, seed=seeds, scale=st.sampled_from([1e-38, 1e-6, 1.0, 1e30]))
def test_decode(codec, width, count, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    records = codec.encode(scale * torch.randn(50, width, generator=generator), generator)
    ids, (fast, plain) = ids_of(50, count, seed), torch.zeros(2, count, width)
    assert gather.decode(records, ids, codec, fast) is fast
    assert torch.equal(fast, gather.decode_twin(records, ids, codec, plain))


def test_every_byte_of_every_codec():
    """All bytes and all scales, NaN and infinities among them: records that no encoder of ours writes."""
    ids = torch.arange(256)
    for codec in CODECS.values():
        width = 33
        size = codec.record_bytes(width)
        records = (torch.arange(256)[:, None] + 7 * torch.arange(size)).to(torch.uint8)
        fast, plain = torch.zeros(2, 256, width)
        gather.decode(records, ids, codec, fast)
        gather.decode_twin(records, ids, codec, plain)
        torch.testing.assert_close(fast, plain, rtol=0, atol=0, equal_nan=True)
        assert codec.name.startswith("int") or bool(plain.isnan().any())


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 70), sizes=st.lists(st.integers(1, 60), max_size=60), seed=seeds)
def test_sum_runs(width, sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(50, width, generator=generator)
    values[::7, 1:], values[::3] = 0.0, -0.0
    values[::11, -1] = float("nan")
    order, ends = ids_of(50, sum(sizes), seed), torch.tensor(sizes, dtype=torch.int64).cumsum(0)
    fast, plain = gather.sum_runs(values, order, ends), gather.sum_runs_twin(values, order, ends)
    torch.testing.assert_close(fast[0], plain[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(fast[0].signbit() & (fast[0] == 0), plain[0].signbit() & (plain[0] == 0))
    assert torch.equal(fast[1], plain[1]) and fast[1].tolist() == [bool(row.any()) for row in fast[0]]


RECORDS, IDS, OUT = torch.zeros(9, 8, dtype=torch.uint8), torch.arange(4), torch.zeros(4, 8, dtype=torch.uint8)
BAD = {
    "ids of int32": (RECORDS, IDS.int(), OUT),
    "ids in two dimensions": (RECORDS, IDS[None], OUT),
    "ids with gaps": (RECORDS, torch.arange(8)[::2], OUT),
    "records of floats": (RECORDS.float(), IDS, OUT),
    "records that are not contiguous": (RECORDS[:, :4], IDS, OUT[:, :4].contiguous()),
    "too few places": (RECORDS, IDS, OUT[:3]),
    "places too narrow": (RECORDS, IDS, OUT[:, :7].contiguous()),
    "places that are not contiguous": (RECORDS, IDS, torch.zeros(4, 16, dtype=torch.uint8)[:, ::2]),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_bad_arrays_are_refused(arguments):
    for call in (gather.gather, gather.scatter):
        with pytest.raises(ValueError, match="must be"):
            call(*arguments)


def test_records_of_another_width_are_refused():
    with pytest.raises(ValueError, match="records of 8 bytes hold no row of 8 values in int8"):
        gather.decode(RECORDS, IDS, CODECS["int8"], torch.zeros(4, 8))
