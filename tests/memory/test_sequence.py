"""Starts, masks and carried tails against twins that walk the tokens one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.memory.sequence import NO_POSITION, Sequence, carry


@st.composite
def rows(draw):
    """A row of tokens (position, alive): documents that restart anywhere, dead tokens anywhere."""
    tokens, position = [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(1, 14))):
        what = draw(st.sampled_from(["next", "next", "next", "restart", "jump", "dead"]))
        if what == "dead":
            tokens.append((draw(st.integers(-3, 9)), False))
            continue
        position = {"next": position + 1, "restart": 0, "jump": position + 3}[what]
        tokens.append((position, True))
    return tokens


@st.composite
def batches(draw):
    """Positions and alive [B, T] of a batch, and the sizes of the chunks that it comes in.

    A document may go on behind dead tokens only in the next forward, so there is a cut at each such place.
    """
    batch = [draw(rows()) for _ in range(draw(st.integers(1, 3)))]
    length = max(map(len, batch))
    batch = [row + [(0, False)] * (length - len(row)) for row in batch]
    positions = torch.tensor([[position for position, _ in row] for row in batch])
    alive = torch.tensor([[is_alive for _, is_alive in row] for row in batch])
    starts, _ = places(positions, alive)
    goes_on = alive[:, 1:] & ~alive[:, :-1] & ~starts[:, 1:]
    cuts = {0, length, *(goes_on.any(dim=0).nonzero().flatten() + 1).tolist()}
    cuts = sorted(cuts | draw(st.sets(st.integers(0, length))))
    return positions, alive, [b - a for a, b in itertools.pairwise(cuts)]


def places(positions, alive):
    """Twin of `place` for whole rows: where documents start, and the slot of the start of each token's."""
    starts, documents = [], []
    for row, living in zip(positions.tolist(), alive.tolist(), strict=True):
        before, document, row_starts, row_documents = NO_POSITION, 0, [], []
        for slot, (position, is_alive) in enumerate(zip(row, living, strict=True)):
            start = is_alive and position != before + 1
            document = slot if start else document
            before = position if is_alive else before
            row_starts.append(start)
            row_documents.append(document)
        starts.append(row_starts)
        documents.append(row_documents)
    return torch.tensor(starts), torch.tensor(documents)


def in_chunks(positions, alive, sizes):
    """(slot, Sequence) of every chunk, with the look-back carried as a decode state carries it."""
    last = positions.new_full((len(positions), 1), NO_POSITION)
    document, slot = torch.zeros_like(last), 0
    for size in sizes:
        chunk = slice(slot, slot + size)
        sequence = Sequence.place(positions[:, chunk], alive[:, chunk], slot, last, document)
        yield slot, sequence
        last = carry(last, sequence.position_ids, sequence.alive, sequence.starts, NO_POSITION)
        document = carry(document, sequence.document, sequence.alive, sequence.starts, 0)
        slot += size


@settings(max_examples=150, deadline=None)
@given(batches())
def test_starts_and_documents_in_any_chunks(batch):
    positions, alive, sizes = batch
    starts, documents = places(positions, alive)
    for slot, sequence in in_chunks(positions, alive, sizes):
        chunk = slice(slot, slot + sequence.alive.shape[1])
        assert torch.equal(sequence.starts, starts[:, chunk])
        living = sequence.alive  # a dead token is in no document
        assert torch.equal(sequence.document[living], documents[:, chunk][living])


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(0, 4))
def test_mask_in_any_chunks(batch, spare):
    """`spare` slots at the end of a static cache are never seen."""
    positions, alive, sizes = batch
    _, documents = places(positions, alive)
    slots = positions.shape[1]
    for slot, sequence in in_chunks(positions, alive, sizes):
        steps = sequence.alive.shape[1]
        key_alive = alive.clone()
        key_alive[:, slot + steps :] = False
        mask = sequence.mask(slot, torch.nn.functional.pad(key_alive, (0, spare)))
        assert mask.shape == (len(positions), 1, steps, slots + spare)
        for row in range(len(positions)):
            for query in range(slot, slot + steps):
                seen = set(mask[row, 0, query - slot].nonzero().flatten().tolist())
                assert query in seen
                if alive[row, query]:
                    document = int(documents[row, query])
                    assert seen == {key for key in range(document, query + 1) if alive[row, key]}


def carried(length, columns, alive, starts, empty):
    """Twin of `carry` for whole rows of numbers: the last entries of the current document."""
    tails = []
    for row, living, row_starts in zip(columns.tolist(), alive.tolist(), starts.tolist(), strict=True):
        seen, at_last_alive = [], []
        for value, is_alive, start in zip(row, living, row_starts, strict=True):
            seen = [] if start else seen
            seen = [*seen, value]
            at_last_alive = seen if is_alive else at_last_alive
        tails.append(([empty] * length + at_last_alive)[-length:])
    return torch.tensor(tails)


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(1, 5), st.sampled_from([0, -7]))
def test_carry_in_any_chunks(batch, length, empty):
    """Dead tokens inside of a document are in its tail (their columns say so), trailing ones are not."""
    positions, alive, _ = batch
    starts, _ = places(positions, alive)
    columns = torch.where(alive, 100 + torch.arange(alive.numel()).view_as(alive), -1)
    expected = carried(length, columns, alive, starts, empty)
    tail = columns.new_full((len(columns), length), empty)
    assert torch.equal(carry(tail, columns, alive, starts, empty), expected)


@settings(max_examples=150, deadline=None)
@given(batches(), st.integers(1, 5))
def test_carry_forgets_how_it_was_cut(batch, length):
    """Where dead tokens lie at the ends of rows only, as padding does, the cut does not show."""
    positions, alive, sizes = batch
    order = alive.int().argsort(dim=1, descending=True, stable=True)
    positions, alive = positions.gather(1, order), alive.gather(1, order)
    starts, _ = places(positions, alive)
    columns = 100 + torch.arange(alive.numel()).view(*alive.shape, 1).repeat(1, 1, 2)
    empty = columns.new_full((len(columns), length, 2), -7)
    whole = carry(empty, columns, alive, starts, -7)
    assert torch.equal(whole[..., 0], carried(length, columns[..., 0], alive, starts, -7))
    tail, slot = empty, 0
    for size in sizes:
        chunk = slice(slot, slot + size)
        tail = carry(tail, columns[:, chunk], alive[:, chunk], starts[:, chunk], -7)
        slot += size
    assert torch.equal(tail, whole)


def test_a_tail_takes_the_dtype_that_it_has():
    tail = torch.zeros(1, 2, dtype=torch.bfloat16)
    out = carry(tail, torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool), 0.0)
    assert out.dtype == torch.bfloat16 and out.tolist() == [[0.0, 1.0]]


def test_a_hole_in_a_document_is_refused():
    alive = torch.tensor([[True, True, True, True], [False, True, False, True]])
    nothing = torch.full((2, 1), NO_POSITION)
    with pytest.raises(ValueError, match="row 1 goes on at token 3 behind padding"):
        Sequence.place(torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]]), alive, 0, nothing, torch.zeros_like(nothing))


@settings(max_examples=100, deadline=None)
@given(batches(), st.booleans())
def test_a_step_is_placed_as_any_token(batch, positions_given):
    positions, alive, _ = batch
    last = positions.new_full((len(positions), 1), NO_POSITION)
    document = torch.zeros_like(last)
    for slot in range(positions.shape[1]):
        living, given = alive[:, slot : slot + 1], positions[:, slot : slot + 1]
        if not positions_given:
            given = (last.clamp_min(-1) + living.long()).clamp_min(0)
        whole = Sequence.place(given, living, slot, last, document)
        step = Sequence.step(given if positions_given else None, living, slot, last, document)
        for name in ("position_ids", "alive", "starts", "document"):
            assert torch.equal(getattr(step, name), getattr(whole, name))
        assert step.goes_on == whole.goes_on == bool(living.all() and not whole.starts.any())
        last = carry(last, step.position_ids, living, step.starts, NO_POSITION)
        document = carry(document, step.document, living, step.starts, 0)


def test_only_a_single_token_goes_on():
    alive, ids = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.int64)
    assert Sequence(ids[:, :1], alive[:, :1], ~alive[:, :1], ids[:, :1]).goes_on
    assert not Sequence(ids, alive, ~alive, ids).goes_on
