"""What collators say of packed documents is honoured or refused; an argument that nobody reads is refused."""

import warnings

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

from tests.models.conftest import VOCABULARY, make
from tests.models.dlcm.conftest import make as make_dlcm

LENGTHS = (1, 2, 9, 1, 5)
DOCUMENTS = [
    torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(i)).tolist()
    for i, n in enumerate(LENGTHS)
]
ROW = torch.tensor([[token for document in DOCUMENTS for token in document]])
NUMBERS = torch.repeat_interleave(torch.arange(1, 6), torch.tensor(LENGTHS))[None]
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


@pytest.fixture(scope="module", params=["engram", "dlcm"])
def model(request):
    return (make() if request.param == "engram" else make_dlcm(memory_layers=[0])).eval()


@torch.no_grad()
def logits(model, **inputs):
    return model(**{"input_ids": ROW, "use_cache": False, **inputs}).logits


@pytest.fixture(scope="module")
def alone(model):
    return torch.cat([logits(model, input_ids=torch.tensor([document])) for document in DOCUMENTS], dim=1)


SAID = {
    "position ids": {"position_ids": POSITIONS},
    "positions from 2": {"position_ids": POSITIONS + 2},
    "flash arguments": {"cu_seq_lens_q": ENDS.int(), "cu_seq_lens_k": ENDS.int(), "max_length_q": 9, "max_length_k": 9},
    "flash arguments and position ids": {"cu_seq_lens_q": ENDS.int(), "position_ids": POSITIONS},
    "flash arguments and one count of positions": {"cu_seq_lens_q": ENDS, "position_ids": torch.arange(18)[None]},
    "lengths of linear attention": {"cu_seqlens": ENDS},
    "an empty document": {"cu_seq_lens_q": torch.cat([ENDS[:2], ENDS[1:]])},
    "numbers": {"seq_idx": (NUMBERS - 1).int()},
    "numbers and positions from 2": {"seq_idx": NUMBERS, "position_ids": POSITIONS + 2},
    "a mask of numbers": {"attention_mask": NUMBERS},
    "a mask of numbers and position ids": {"attention_mask": NUMBERS, "position_ids": POSITIONS},
    "a mask beside": {"seq_idx": NUMBERS, "attention_mask": torch.ones_like(ROW)},
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_packed_documents_are_as_they_are_alone(model, alone, said):
    torch.testing.assert_close(logits(model, **said), alone, atol=1e-5, rtol=0)
    assert (logits(model) - alone).abs().max() > 1e-3  # one document would be another thing


@pytest.mark.parametrize("options", [{"return_flash_attn_kwargs": True}, {"return_seq_idx": True}])
@pytest.mark.parametrize("positions", [True, False])
def test_what_the_collator_of_transformers_makes(model, options, positions):
    collator = DataCollatorWithFlattening(return_position_ids=positions, **options)
    batch = collator([{"input_ids": document} for document in DOCUMENTS])
    with torch.no_grad():
        loss = model(**batch).loss
        expected = model(input_ids=ROW, labels=batch["labels"], position_ids=POSITIONS).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


def test_rows_of_packed_documents(model):
    """Two rows, one with padding: lengths count all tokens, numbers and masks are of each row."""
    rows = ROW.expand(2, -1)
    mask = torch.ones_like(rows)
    mask[1, 3:5] = 0  # the end of what its document was
    positions = POSITIONS.repeat(2, 1)
    positions[1, 5:12] -= 2  # behind the padding another begins
    expected = logits(model, input_ids=rows, attention_mask=mask, position_ids=positions)
    number = NUMBERS.repeat(2, 1)
    number[1, 3:5] = 9  # documents of padding alone
    ends = torch.cat([ENDS, ENDS[1:] + 18])
    for said in (
        {"seq_idx": number},
        {"attention_mask": number * mask},
        {"cu_seq_lens_q": torch.sort(torch.cat([ends, torch.tensor([23])])).values},
    ):
        found = logits(model, **{"input_ids": rows, "attention_mask": mask, **said})
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_mask_of_numbers_with_a_cache(model, alone):
    """In pieces, down to single tokens: a new number begins a document."""
    cache, parts, at = DynamicCache(config=model.config), [], 0
    for steps in (2, 5, 1, 1, 4, 1, 1, 3):
        mask = NUMBERS[:, : at + steps]
        parts.append(model(input_ids=ROW[:, at : at + steps], attention_mask=mask, past_key_values=cache).logits)
        at += steps
    torch.testing.assert_close(torch.cat(parts, dim=1), alone, atol=1e-5, rtol=0)


BLOCKS = (NUMBERS[0][:, None] == NUMBERS[0]).tril()
REFUSED = {
    "positions inside of a document": ({"seq_idx": torch.ones_like(ROW), "position_ids": POSITIONS}, "seq_idx"),
    "two that differ": ({"cu_seq_lens_q": ENDS, "seq_idx": torch.ones_like(ROW)}, "seq_idx and cu_seq_lens_q"),
    "lengths of other tokens": ({"cu_seq_lens_q": ENDS[:-1]}, "from 0 to the 18 tokens"),
    "lengths that do not ascend": ({"cu_seqlens": torch.tensor([0, 9, 3, 18])}, "ascend"),
    "a document over rows": (
        {"input_ids": ROW.view(2, 9), "cu_seq_lens_q": torch.tensor([0, 12, 18])},
        "from one row of 9 tokens into the next",
    ),
    "numbers of another shape": ({"seq_idx": torch.ones(1, 4)}, r"seq_idx must be \[1, 18\]"),
    "a mask of 4 dimensions": ({"attention_mask": BLOCKS[None, None]}, "let position_ids begin anew"),
    "a mask of 3 dimensions": ({"attention_mask": BLOCKS[None]}, "let position_ids begin anew"),
    "a mask that is added": ({"attention_mask": torch.zeros(1, 18)}, "attention_mask == 0"),
    "a mask that is added and hides": (
        {"attention_mask": torch.tensor([[float("-inf")] * 3 + [0.0] * 15])},
        "attention_mask == 0",
    ),
    "a mask of weights": ({"attention_mask": torch.full((1, 18), 0.5)}, "zeros and ones"),
    "a mask with -1": ({"attention_mask": ROW.new_full((1, 18), -1)}, "negative value -1"),
    "a mask of numbers that descend": ({"attention_mask": NUMBERS.flip(1)}, "do not ascend"),
    "positions that are floats": ({"position_ids": POSITIONS.float()}, "position_ids must be integers"),
    "attentions": ({"output_attentions": True}, "output_attentions=True"),
    "router logits": ({"output_router_logits": True}, "output_router_logits=True"),
    "both directions": ({"is_causal": False}, "is_causal=False"),
}
UNKNOWN = {
    "a typo": ({"position_id": POSITIONS}, "position_id: did you mean position_ids?"),
    "a word of others": ({"attn_mask": torch.ones_like(ROW)}, "attn_mask: did you mean attention_mask?"),
    "an old name": ({"num_logits_to_keep": 1}, "num_logits_to_keep: did you mean logits_to_keep?"),
    "types": ({"token_type_ids": torch.ones_like(ROW)}, "token_type_ids"),
    "another's": ({"speaker": torch.ones(1, 3)}, "speaker: leave it out"),
    "masks by kind": ({"attention_mask": {"full_attention": None}}, "must be a tensor .* got a dict"),
}


@pytest.mark.parametrize(("said", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(model, said, message):
    with pytest.raises(ValueError, match=message):
        logits(model, **said)


@pytest.mark.parametrize(("said", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_unknown(model, said, message):
    with pytest.raises(TypeError, match=message.replace("?", r"\?")):
        logits(model, **said)


def test_boundaries_behind_a_past_are_refused(model):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ROW, past_key_values=cache)
        with pytest.raises(ValueError, match="seq_idx is of a batch without a past, past_key_values holds 18 tokens"):
            model(input_ids=ROW, past_key_values=cache, seq_idx=NUMBERS)
    assert cache.get_seq_length() == 18


def test_what_transformers_hands_to_every_model(model):
    expected = logits(model)
    found = logits(
        model,
        output_attentions=False,
        output_hidden_states=False,
        output_router_logits=None,
        return_dict=True,
        cache_position=torch.arange(18),
        num_items_in_batch=None,
        logits_to_keep=0,
        is_causal=True,
        token_type_ids=torch.zeros_like(ROW),
        attention_mask=torch.ones(1, 18),  # floats of 0 and 1
    )
    assert torch.equal(found, expected)


def test_labels(model):
    for labels, message in ((ROW.float(), "labels must be int64"), (ROW[:, :4], r"labels must be \[1, 18\]")):
        with pytest.raises(ValueError, match=message):
            model(input_ids=ROW, labels=labels)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_a_loss_over_nothing_is_zero(skip_logits):
    model = make(balance_loss_alpha=0.1).train()
    loss = model(input_ids=ROW, labels=torch.full_like(ROW, -100), skip_logits=skip_logits).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.endswith(".anchor")}
    assert loss == 0 and all(gradient is None or not gradient.any() for gradient in gradients.values())
    assert all(memory.lookup.pending.take() is None for _, memory in model.memory_stack.items())


def test_tokens_beyond_the_longest_text_are_told_of():
    model = make(max_position_embeddings=16).eval()
    with pytest.warns(UserWarning, match="beyond max_position_embeddings=16"):
        logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, seq_idx=NUMBERS)  # a row of short documents


def test_tuples(model):
    expected = logits(model)
    model.config.return_dict = False
    try:
        with torch.no_grad():
            found = model(input_ids=ROW, use_cache=False)
    finally:
        model.config.return_dict = True
    assert isinstance(found, tuple) and torch.equal(found[0], expected)
