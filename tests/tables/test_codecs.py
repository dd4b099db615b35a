"""Codecs: the stated error, exact second encoding, zeros, extremes, records byte by byte, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.tables.codecs import CODECS

codecs = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
MAX, TINY = torch.finfo(torch.float32).max, 2.0**-149
# Widths on both sides of the block of 32, odd ones among them.
ROWS = st.integers(1, 70).flatmap(
    lambda width: st.lists(st.lists(FINITE, min_size=width, max_size=width), min_size=1, max_size=3)
)


def encode(codec, values, seed=0):
    return codec.encode(values, torch.Generator().manual_seed(seed))


def check(codec, values):
    records = encode(codec, values)
    assert records.dtype == torch.uint8 and records.shape == (len(values), codec.record_bytes(values.shape[1]))
    decoded = codec.decode(records, values.shape[1])
    error = (decoded.double() - values.double()).abs().amax(1)
    assert bool((error <= codec.bound(values).double()).all()), (error, codec.bound(values))
    assert bool((decoded[values == 0] == 0).all())
    again = codec.decode(encode(codec, decoded, seed=1), values.shape[1])
    assert torch.equal(again, decoded)


@codecs
@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_any_finite_rows(codec, rows):
    check(codec, torch.tensor(rows))


@codecs
@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 300), scale=st.integers(-150, 125), seed=st.integers(0, 2**31))
def test_random_rows_of_any_scale(codec, width, scale, seed):
    values = torch.randn(4, width, generator=torch.Generator().manual_seed(seed)).double() * 2.0**scale
    check(codec, values.float().nan_to_num(posinf=MAX, neginf=-MAX))


@codecs
@pytest.mark.parametrize("value", [MAX, -MAX, TINY, -TINY, 2.0**-126, 448.0, 449.0, 127 * 2.0**-126, 0.0, -0.0])
def test_extreme_values(codec, value):
    for width in (1, 31, 32, 33, 64, 65):
        values = torch.zeros(2, width)
        values[0, -1] = value
        values[1, ::2] = value
        check(codec, values)


@codecs
def test_no_rows(codec):
    assert codec.decode(encode(codec, torch.zeros(0, 5)), 5).shape == (0, 5)


@codecs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(codec, bad):
    values = torch.zeros(5, 40)
    values[3, 7] = bad
    with pytest.raises(ValueError, match="row 3 of the 5 given"):
        encode(codec, values)


def test_float32_is_exact():
    values = torch.randn(3, 7)
    assert torch.equal(CODECS["fp32"].decode(CODECS["fp32"].encode(values), 7), values)


def test_bfloat16_is_to_nearest_even():
    values = torch.tensor([[1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -1 - 2.0**-8]])
    decoded = CODECS["bf16"].decode(CODECS["bf16"].encode(values), 4)
    assert decoded.tolist() == [[1.0, 1 + 2.0**-6, 1 + 2.0**-7, -1.0]]


def test_stochastic_rounding_is_right_on_average():
    """The mean of n draws of a value between two neighbours one step apart lies within 5 step / (2 sqrt(n))."""
    codec, draws = CODECS["bf16-stochastic"], 40_000
    generator = torch.Generator().manual_seed(0)
    for value in (1.0001, -1.0001, 0.7 * 2.0**-9, 3.001, -1.005):
        step = 2.0 ** (torch.frexp(torch.tensor(value))[1].item() - 8)
        decoded = codec.decode(codec.encode(torch.full((draws, 1), value), generator), 1).double()
        assert decoded.unique().numel() == 2
        assert abs(decoded.mean() - torch.tensor(value).double()) < 5 * step / (2 * draws**0.5)


def test_stochastic_rounding_repeats_with_its_seed():
    codec, values = CODECS["bf16-stochastic"], torch.randn(50, 16)
    first, same, other = (encode(codec, values, seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="rounds by chance"):
        codec.encode(values)


def test_small_steps_survive_on_average_only_with_stochastic_rounding():
    """1,000 steps of 2^-12 from 1, half of them lost to nothing in bf16, whose neighbours are 2^-7 apart."""
    ends = {}
    for name in ("bf16", "bf16-stochastic"):
        codec, generator = CODECS[name], torch.Generator().manual_seed(0)
        values = torch.ones(200, 1)
        for _ in range(1000):
            values = codec.decode(codec.encode(values + 2.0**-12, generator), 1)
        ends[name] = float(values.mean())
    assert ends["bf16"] == 1.0 and abs(ends["bf16-stochastic"] - (1 + 1000 * 2.0**-12)) < 0.01


def test_the_released_row_of_264_bytes():
    """256 e4m3 bytes, then 8 e8m0 bytes, scale 2^(byte - 127): decoded by hand."""
    values = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    (record,) = CODECS["fp8"].encode(values).tolist()
    assert len(record) == 264
    decoded = CODECS["fp8"].decode(torch.tensor([record], dtype=torch.uint8), 256)[0].tolist()
    for i, byte in enumerate(record[:256]):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        number = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa * 2.0**-9
        assert decoded[i] == (-number if byte & 128 else number) * 2.0 ** (record[256 + i // 32] - 127)
    for block, byte in enumerate(record[256:]):
        largest = float(values[0, 32 * block : 32 * block + 32].abs().max())
        assert 224 * 2.0 ** (byte - 127) < largest <= 448 * 2.0 ** (byte - 127)


def test_nan_of_a_foreign_row_reads_as_nan():
    record = CODECS["fp8"].encode(torch.ones(1, 64))
    record[0, 3], record[0, 4], record[0, 65] = 0x7F, 0xFF, 255
    decoded = CODECS["fp8"].decode(record, 64)[0]
    assert decoded.isnan().nonzero().squeeze(1).tolist() == [3, 4, *range(32, 64)]


def test_records_of_integers():
    record = CODECS["int8"].encode(torch.tensor([[127.0, -2.0, 0.4]]))
    assert record.tolist() == [[127, 254, 0, 0, 0, 128, 63]]  # scale 1.0 = 0x3f800000
    record = CODECS["int4"].encode(torch.tensor([[7.0, -1.0, -7.0]]))
    assert record.tolist() == [[7 | 15 << 4, 9, 0, 0, 128, 63]]
