"""MemoryState as a layer of a Hugging Face cache: joining, moving on, taking back, and what is refused."""

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from byrote.memory import MemoryState, Sequence
from byrote.memory.sequence import NO_POSITION, carry
from byrote.memory.state import Field

BATCH, LAYERS = 3, 2
FIELDS = {"ids": Field(2, empty=-9), "convolution.0": Field(3, (2,), dtype=None)}


def begun(batch=BATCH, dtype=torch.float32) -> MemoryState:
    state = MemoryState(FIELDS)
    state.begin(batch, dtype, torch.device("cpu"))
    return state


def tokens(count, first=0, batch=BATCH) -> tuple[torch.Tensor, Sequence]:
    """Ids that say where they stand, in one document that begins at token 0."""
    position = torch.arange(first, first + count).expand(batch, -1)
    alive = torch.ones_like(position, dtype=torch.bool)
    sequence = Sequence(position, alive, position == 0, torch.zeros_like(position))
    return position + 100 * torch.arange(batch)[:, None], sequence


def feed(state, count, first=0, batch=BATCH) -> None:
    ids, sequence = tokens(count, first, batch)
    state.advance("ids", ids, sequence)
    state.advance("convolution.0", torch.stack([ids, -ids], -1).float(), sequence)
    state.advance("position", sequence.position_ids, sequence)
    state.advance("document", sequence.document, sequence)


def same_tails(state, other) -> bool:
    return all(torch.equal(state.tails[name], other.tails[name]) for name in state.tails)


def fill(cache: DynamicCache, layers=LAYERS) -> None:
    for layer in range(layers):
        cache.update(torch.ones(BATCH, 1, 4, 2), torch.ones(BATCH, 1, 4, 2), layer)


def test_attach_to_a_lazy_cache():
    cache = DynamicCache()
    state = MemoryState.attach(cache, LAYERS, FIELDS)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * LAYERS + [MemoryState]
    assert MemoryState.attach(cache, LAYERS, FIELDS) is state
    fill(cache)
    assert MemoryState.attach(cache, LAYERS, FIELDS) is state and cache.get_seq_length() == 4


def test_attach_without_attention_layers():
    cache = DynamicCache()
    assert cache.layers is not MemoryState.attach(cache, 0, FIELDS) and len(cache.layers) == 1


def test_a_cache_that_another_model_filled_is_refused_and_left_alone():
    cache = DynamicCache()
    fill(cache)
    with pytest.raises(ValueError, match="holds tokens but no memory state"):
        MemoryState.attach(cache, LAYERS, FIELDS)
    with pytest.raises(ValueError, match="holds tokens but no memory state"):
        MemoryState.attach(cache, LAYERS + 1, FIELDS)
    assert len(cache.layers) == LAYERS


def test_a_cache_of_another_depth_is_refused():
    cache = DynamicCache()
    MemoryState.attach(cache, LAYERS, FIELDS)
    for layers in (LAYERS + 1, LAYERS - 1):
        with pytest.raises(ValueError, match="past_key_values"):
            MemoryState.attach(cache, layers, FIELDS)
    assert len(cache.layers) == LAYERS + 1


def test_a_cache_made_for_another_config_is_refused():
    cache = DynamicCache()
    cache.layers += [DynamicLayer(), DynamicLayer(), DynamicLayer()]
    cache.layer_class_to_replicate = None  # as a cache that was made with a config has it
    for layers in (LAYERS, LAYERS + 2):
        with pytest.raises(ValueError, match=f"has 3 layers, the model {layers}"):
            MemoryState.attach(cache, layers, FIELDS)


def test_the_state_of_another_memory_is_refused():
    cache = DynamicCache()
    MemoryState.attach(cache, LAYERS, FIELDS)
    with pytest.raises(ValueError, match="another model"):
        MemoryState.attach(cache, LAYERS, {"ids": Field(3, empty=-9)})


def test_empty_tails():
    state = begun(dtype=torch.bfloat16)
    assert {name: (tuple(tail.shape), tail.dtype) for name, tail in state.tails.items()} == {
        "position": ((BATCH, 1), torch.int64),
        "document": ((BATCH, 1), torch.int64),
        "ids": ((BATCH, 2), torch.int64),
        "convolution.0": ((BATCH, 3, 2), torch.bfloat16),
    }
    assert bool((state.tails["position"] == NO_POSITION).all()) and bool((state.tails["ids"] == -9).all())


def test_another_batch_size_is_refused():
    state = begun()
    feed(state, 3)
    before = copy.deepcopy(state)
    with pytest.raises(ValueError, match="holds 3 rows, input_ids 2"):
        state.begin(2, torch.float32, torch.device("cpu"))
    assert same_tails(state, before)


def test_tails_move_with_the_tokens():
    state = begun()
    feed(state, 1)
    assert state.tails["ids"].tolist() == [[-9, 0], [-9, 100], [-9, 200]]
    feed(state, 5, first=1)
    assert state.tails["ids"].tolist() == [[4, 5], [104, 105], [204, 205]]
    assert state.tails["convolution.0"][1].tolist() == [[103, -103], [104, -104], [105, -105]]
    assert state.tails["position"].tolist() == [[5]] * BATCH


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_buffers_stay_where_they_are(mode):
    with mode():
        state = begun()
        places = {name: tail.data_ptr() for name, tail in state.tails.items()}
        for step in range(4):
            feed(state, 1, first=step)
        assert {name: tail.data_ptr() for name, tail in state.tails.items()} == places


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_steps_without_gradients_move_tails_as_any(mode):
    """What is given to a step stays the caller's: no tail is it, and none is written through it."""
    ids, sequence = tokens(1)
    feed(plain := begun(), 3)
    with mode():
        feed(state := begun(), 3)
        for step in range(3, 9):
            feed(state, 1, first=step)
        state.advance("ids", ids, sequence)
    for step in range(3, 9):
        feed(plain, 1, first=step)
    plain.advance("ids", ids, sequence)
    assert same_tails(plain, state)
    with mode():
        position, sequence = torch.full((BATCH, 1), 9), tokens(1, 9)[1]
        state.advance("position", position, sequence)
        state.advance("position", position + 1, sequence)
    assert position.eq(9).all() and state.tails["position"].eq(10).all()


def test_with_gradients_nothing_is_changed_in_place():
    """A tail that backward needs is not overwritten."""
    state = begun()
    weight = torch.ones(BATCH, 2, 2, requires_grad=True)
    loss = 0.0
    for step in range(2):
        _, sequence = tokens(2, first=2 * step)
        state.advance("convolution.0", weight * 3, sequence)
        loss = loss + (state.tails["convolution.0"] * weight[:, :1]).pow(2).sum()
    with torch.no_grad():
        state.advance("convolution.0", torch.zeros(BATCH, 1, 2), tokens(1, first=4)[1])
    loss.backward()
    assert weight.grad is not None


def test_modes_may_change_between_tokens():
    """Prefill in inference mode, decode under no_grad, and the other way round."""
    expected = begun()
    feed(expected, 6)
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        with first():
            state = begun()
            feed(state, 3)
        with second():
            feed(state, 2, first=3)
            feed(state, 1, first=5)
        assert same_tails(state, expected)


@pytest.mark.parametrize("before", [1, 4])
@pytest.mark.parametrize("back", [1, 2, 5, 6])
def test_crop_to_any_depth(before, back):
    state, expected = begun(), begun()
    feed(state, before)
    state.activate_past_recording()
    for first, count in ((0, 2), (2, 1), (3, 3)):
        feed(state, count, first=before + first)
    state.crop(-back)
    feed(expected, before + 6 - back)
    assert same_tails(state, expected)
    feed(state, 2, first=before + 6 - back)  # it goes on, and back again
    state.crop(-1)
    feed(expected, 1, first=before + 6 - back)
    assert same_tails(state, expected)


def test_crop_of_nothing():
    state = begun()
    feed(state, 3)
    before = copy.deepcopy(state)
    state.crop(0)
    assert same_tails(state, before)
    MemoryState(FIELDS).crop(-3)  # as an attention layer has it: nothing is there to be removed


def test_crops_that_are_refused():
    state = begun()
    feed(state, 3)
    with pytest.raises(ValueError, match="zero or a negative count"):
        state.crop(2)
    with pytest.raises(RuntimeError, match="0 are recorded"):
        state.crop(-1)
    state.activate_past_recording()
    feed(state, 2, first=3)
    before = copy.deepcopy(state)
    with pytest.raises(RuntimeError, match="cannot take back 3 tokens, 2 are recorded"):
        state.crop(-3)
    assert same_tails(state, before)
    state.crop(-2)
    expected = begun()
    feed(expected, 3)
    assert same_tails(state, expected)


CHANGES = {
    "reorder": (lambda state: state.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda state: state.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda state: state.batch_select_indices(torch.tensor([1])), [1]),
    "select by mask": (lambda state: state.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
}


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize(("change", "rows"), CHANGES.values(), ids=CHANGES)
def test_rows_move_with_all_that_is_recorded(change, rows, recording):
    state = begun()
    feed(state, 3)
    before = copy.deepcopy(state)
    if recording:
        state.activate_past_recording()
        feed(state, 2, first=3)
    now = copy.deepcopy(state)
    change(state)
    assert all(torch.equal(state.tails[name], now.tails[name][rows]) for name in FIELDS)
    state.begin(len(rows), torch.float32, torch.device("cpu"))
    if recording:
        state.crop(-2)
        assert all(torch.equal(state.tails[name], before.tails[name][rows]) for name in FIELDS)
        feed(state, 2, first=3, batch=len(rows))  # columns of the new rows join those that were moved
        state.crop(-1)


def test_reset_begins_anew():
    state = begun()
    feed(state, 5)
    state.reset()
    state.crop(-1)
    state.begin(1, torch.float32, torch.device("cpu"))
    assert same_tails(state, begun(batch=1))


def test_it_counts_no_slots_and_holds_no_keys():
    state = begun()
    assert (state.get_seq_length(), state.get_max_length(), state.get_mask_sizes(4)) == (0, -1, (4, 0))
    state.offload()
    state.prefetch()
    for call in (state.update, state.lazy_initialization):
        with pytest.raises(NotImplementedError, match="MemoryState"):
            call(torch.ones(1), torch.ones(1))


def test_a_whole_cache_passes_on_what_it_is_asked():
    cache = DynamicCache()
    state = MemoryState.attach(cache, LAYERS, FIELDS)
    state.begin(BATCH, torch.float32, torch.device("cpu"))
    cache.activate_past_recording()
    assert state.record_past
    feed(state, 4)
    fill(cache)
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    expected = begun()
    feed(expected, 3)
    assert cache.get_seq_length() == 3
    assert torch.equal(state.tails["ids"], expected.tails["ids"][[1, 0, 2]])
    ids, sequence = tokens(3)
    assert torch.equal(
        carry(torch.full((BATCH, 2), -9), ids, sequence.alive, sequence.starts, -9), expected.tails["ids"]
    )
    cache.reset()
    assert not state.is_initialized
