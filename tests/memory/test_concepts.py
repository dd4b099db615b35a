"""ConceptState: buffers that grow, open segments, and what a crop finds again."""

import copy

import pytest
import torch
from transformers import DynamicCache

from byrote.memory import MemoryState, Sequence
from byrote.memory.concept_state import NOWHERE, ConceptState
from byrote.memory.state import Field
from tests.nn.test_pooling import loop

ROWS, HIDDEN = 3, 3
FIELDS = {"query": Field(1, (2,), dtype=torch.float32)}


def begun(rows=ROWS, dtype=torch.float64):
    state = ConceptState(FIELDS)
    state.begin(rows, dtype, torch.device("cpu"))
    state.begin_concepts(rows, HIDDEN, dtype, torch.device("cpu"))
    return state


def tokens(seed, steps=9, starts_at=None):
    generator = torch.Generator().manual_seed(seed)
    alive = torch.ones(ROWS, steps, dtype=torch.bool)
    alive[1, -2:] = False
    starts = torch.zeros_like(alive)
    if starts_at is not None:
        starts[:, starts_at] = True
    boundaries = ((torch.rand(ROWS, steps, generator=generator) < 0.3) | starts) & alive
    h = torch.randn(ROWS, steps, HIDDEN, generator=generator, dtype=torch.float64)
    places = torch.arange(steps).expand(ROWS, -1)
    return h, boundaries, Sequence(places, alive, starts, torch.zeros_like(places))


def feed(state, h, boundaries, sequence, opens):
    """As a model does: tails, slots, then the open segment."""
    state.advance("position", sequence.position_ids, sequence)
    row, step = boundaries.nonzero(as_tuple=True)
    counts = boundaries.sum(dim=1)
    rank = (boundaries.cumsum(dim=1) - 1)[row, step]
    most = int((state.lengths + counts).max())
    if len(row):
        slots = state.lengths[row] + rank
        state.write("document", row, slots, sequence.document[row, step], most)
        state.write("read_key", row, slots, h[row, step].unflatten(-1, (1, HIDDEN)), most)
        state.keep_last(row, slots, h[row, step], rank == counts[row] - 1, most)
    state.close(h, boundaries, sequence, opens)


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("cuts", [[27], [9, 9, 9], [1] * 27, [4, 20, 3]])
def test_the_open_segment_is_what_a_reader_would_have_in_hand(opens, cuts):
    parts = [tokens(seed, starts_at=0 if seed == 0 else 4 if seed == 2 else None) for seed in range(3)]
    h, boundaries = (torch.cat([part[i] for part in parts], dim=1) for i in (0, 1))
    whole = [torch.cat([getattr(part[2], name) for part in parts], dim=1) for name in ("alive", "starts")]
    _, rests = loop(h, boundaries, *whole, "open" if opens else "close")
    state, at = begun(), 0
    for size in cuts:
        chunk = slice(at, at + size)
        places = torch.zeros(ROWS, size, dtype=torch.long)
        sequence = Sequence(places, whole[0][:, chunk], whole[1][:, chunk], places)
        feed(state, h[:, chunk], boundaries[:, chunk], sequence, opens)
        at += size
    assert state.open_count.tolist() == [len(rest) for rest in rests]
    for row, rest in enumerate(rests):
        total = sum((value for value, _ in rest), torch.zeros(HIDDEN, dtype=torch.float64))
        torch.testing.assert_close(state.open_total[row], total, atol=1e-12, rtol=0)
    assert torch.equal(state.lengths, boundaries.sum(dim=1))


def test_buffers_grow_and_keep_what_they_hold():
    state, written = begun(), [[] for _ in range(ROWS)]
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        rows = (torch.rand(ROWS, generator=generator) < 0.7).nonzero().squeeze(1)
        if not len(rows):
            continue
        keys, ids = torch.randn(len(rows), 2, 4, generator=generator), torch.full((len(rows),), step)
        slots = state.lengths[rows]
        most = int(slots.max()) + 1
        state.write("0_key", rows, slots, keys, most)
        state.write("document", rows, slots, ids, most)
        for row, key in zip(rows.tolist(), keys, strict=True):
            written[row].append((step, key))
        state.lengths = state.lengths.index_add(0, rows, torch.ones_like(rows))
    assert max(map(len, written)) > 32
    kept, ids = state.read("0_key"), state.read("document")
    for row, values in enumerate(written):
        assert ids[row, : len(values)].tolist() == [step for step, _ in values]
        assert (ids[row, len(values) :] == NOWHERE).all()
        assert torch.equal(kept[row, :, : len(values)], torch.stack([key for _, key in values], dim=1))
    some = state.read("0_key", torch.tensor([0, 2]), 5)
    assert torch.equal(some, kept[[0, 2], :, :5])
    taken = sum(map(len, written))
    assert state.nbytes == taken * 2 * 4 * 4 + taken * 8  # the concepts alone, without the room behind them


def test_writing_leaves_what_a_backward_needs():
    state = begun(dtype=torch.float32)
    rows, slots = torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.long)
    keys = torch.randn(ROWS, 2, 4, requires_grad=True)
    state.write("0_key", rows, slots, keys, 2)
    before = state.read("0_key", None, 2)
    state.write("0_key", rows, slots + 1, 2 * keys, 2)
    (before.square().sum() + state.read("0_key", None, 2).sum()).backward()
    torch.testing.assert_close(keys.grad, 2 * keys.detach() + 3)


def same(state, other):
    assert torch.equal(state.lengths, other.lengths) and torch.equal(state.open_count, other.open_count)
    torch.testing.assert_close(state.open_total, other.open_total, atol=1e-12, rtol=0)
    for row, length in enumerate(state.lengths.tolist()):
        if length:
            assert torch.equal(state.slots["document"][row, :length], other.slots["document"][row, :length])
            assert torch.equal(state.slots["read_key"][row, :, :length], other.slots["read_key"][row, :, :length])
            assert torch.equal(state.last[row], other.last[row])
        assert "document" not in state.slots or (state.slots["document"][row, length:] == NOWHERE).all()


@pytest.mark.parametrize("opens", [False, True])
@pytest.mark.parametrize("back", [1, 5, 9, 13, 18])
@pytest.mark.parametrize("from_the_first", [False, True])
def test_a_crop_is_as_if_the_tokens_had_never_been(opens, back, from_the_first):
    state = begun()
    parts = [tokens(seed, starts_at=0 if seed == 0 else None) for seed in range(3)]
    if from_the_first:
        state.activate_past_recording()
    feed(state, *parts[0], opens)
    state.activate_past_recording()
    for part in parts[1:]:
        feed(state, *part, opens)
    for part in (back // 2, back - back // 2):
        state.crop(-part)
    expected = begun()
    kept = 27 - back
    for number, (h, boundaries, sequence) in enumerate(parts):
        size = min(max(kept - 9 * number, 0), 9)
        if size:
            cut = Sequence(*(getattr(sequence, name)[:, :size] for name in sequence.__dataclass_fields__))
            feed(expected, h[:, :size], boundaries[:, :size], cut, opens)
    same(state, expected)
    feed(state, *parts[1], opens)
    feed(expected, *parts[1], opens)
    same(state, expected)


@pytest.mark.parametrize("move", ["reorder", "repeat", "select"])
def test_rows_move_with_all_that_is_theirs(move):
    state = begun()
    order = {"reorder": [2, 0, 0], "repeat": [0, 0, 1, 1, 2, 2], "select": [1]}[move]
    index = torch.tensor(order)
    state.activate_past_recording()
    parts = [tokens(seed, starts_at=0 if seed == 0 else None) for seed in range(2)]
    for h, boundaries, sequence in parts:
        feed(state, h, boundaries, sequence, False)
    if move == "reorder":
        state.reorder_cache(index)
    elif move == "repeat":
        state.batch_repeat_interleave(2)
    else:
        state.batch_select_indices(index)
    expected = begun(len(order))
    expected.activate_past_recording()
    for h, boundaries, sequence in parts:
        moved = Sequence(*(getattr(sequence, name)[index] for name in sequence.__dataclass_fields__))
        feed(expected, h[index], boundaries[index], moved, False)
    same(state, expected)
    state.crop(-4)
    expected.crop(-4)
    same(state, expected)


def test_reset_and_copies():
    state = begun()
    feed(state, *tokens(0, starts_at=0), False)
    other = copy.deepcopy(state)
    same(state, other)
    feed(other, *tokens(1), False)
    assert not torch.equal(other.open_count, state.open_count) or not torch.equal(other.lengths, state.lengths)
    state.reset()
    assert not state.slots and not len(state.lengths) and state.last is None and not state.is_initialized
    state.begin(2, torch.float64, torch.device("cpu"))
    state.begin_concepts(2, HIDDEN, torch.float64, torch.device("cpu"))
    assert state.lengths.tolist() == [0, 0]


def test_begun_twice_before_any_token():
    """A call that was refused has begun with its rows; the next one may have others, until there are tokens."""
    state = begun()
    state.begin(1, torch.float64, torch.device("cpu"))
    state.begin_concepts(1, HIDDEN, torch.float64, torch.device("cpu"))
    assert len(state.lengths) == len(state.open_total) == len(state.tails["position"]) == 1
    state = begun()
    feed(state, *tokens(0, starts_at=0), False)
    lengths, total = state.lengths, state.open_total
    state.begin_concepts(ROWS, HIDDEN, torch.float64, torch.device("cpu"))
    assert state.lengths is lengths and state.open_total is total and lengths.any()


def test_a_state_of_another_family_is_refused():
    for first, second in ((MemoryState, ConceptState), (ConceptState, MemoryState)):
        cache = DynamicCache()
        first.attach(cache, 2, FIELDS if first is ConceptState else {})
        with pytest.raises(ValueError, match="past_key_values"):
            second.attach(cache, 2, {} if first is ConceptState else FIELDS)


def test_the_worst_of_crops():
    state = begun()
    with pytest.raises(ValueError, match="zero or a negative count"):
        state.crop(3)
    feed(state, *tokens(0, starts_at=0), False)
    state.crop(0)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        state.crop(-1)
    state.activate_past_recording()
    feed(state, *tokens(1), False)
    before = copy.deepcopy(state)
    with pytest.raises(RuntimeError, match="cannot take back 10 tokens, 9 are recorded"):
        state.crop(-10)
    same(state, before)
