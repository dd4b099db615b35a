"""Embeddings grow, shrink and are padded; the addresses go with them, and no row moves."""

import copy

import numpy as np
import pytest
import torch

from byrote import EngramConfig, EngramForCausalLM
from byrote.address.vocabulary import resize
from tests.models.conftest import VOCABULARY, logits, make, tables, train
from tests.models.dlcm.conftest import make as make_dlcm

FAMILIES = {
    "engram": make,
    "tied, and drafts": lambda **more: make(num_nextn_predict_layers=1, tie_word_embeddings=True, **more),
    "untied": lambda **more: make(tie_word_embeddings=False, **more),
    "dlcm": lambda **more: make_dlcm(memory_layers=[0], **more),
    "no memory": lambda **more: make(memory_layers=[], **more),
}


@pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    ("change", "size"), [((VOCABULARY + 4,), 68), ((VOCABULARY - 6,), 58), ((None, 48), 96), ((70, 16), 80)]
)
def test_a_resized_model_works(tmp_path, build, change, size):
    model = build().eval()
    ids = torch.randint(3, 58, (2, 12), generator=torch.Generator().manual_seed(7))
    kept = min(size, VOCABULARY)
    before = logits(model, ids)[..., :kept]
    model.resize_token_embeddings(*change)
    assert model.config.vocab_size == size
    assert torch.equal(logits(model, ids)[..., :kept], before)  # no row of a known id has moved
    ids[0, 3] = size - 1
    train_ids = ids.clone()
    loss = model.train()(input_ids=train_ids, labels=train_ids).loss
    loss.backward()
    assert loss.isfinite()
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again.eval(), ids), logits(model, ids), atol=1e-6, rtol=0)
    with pytest.raises(
        ValueError, match=rf"is {size}; the vocabulary has the ids 0 .. {size - 1}.*resize_token_embedd"
    ):
        model(input_ids=ids.clamp_min(size))


def test_new_ids_read_rows_of_their_own(folded):
    model = make(vocabulary=folded)
    model.resize_token_embeddings(VOCABULARY + 2)
    seen = model.memory_stack.vocabulary
    assert torch.equal(seen[:VOCABULARY], torch.from_numpy(folded)) and seen[VOCABULARY:].tolist() == [32, 33]
    assert model.memory_stack.spec.compressed_vocab_size == 34
    assert model.config.spec == model.memory_stack.spec
    assert {table.digest for table in tables(model)} == {model.config.spec.digest}


def test_more_ids_than_the_multipliers_have_room_for(ids):
    model = make()
    spec = model.config.spec
    assert spec.most_classes > VOCABULARY
    model.resize_token_embeddings(100 * VOCABULARY)
    last = model.memory_stack.vocabulary[-1]
    assert last == spec.most_classes - 1 and model.config.spec.compressed_vocab_size == spec.most_classes
    logits(model, ids)


def test_there_and_back(ids):
    """What is cut off and comes back is as new; what stays is what it was."""
    model = make().eval()
    model.resize_token_embeddings(60)
    model.resize_token_embeddings(VOCABULARY)
    assert model.config.spec == make().config.spec


def test_refused_at_the_call(tmp_path):
    model = make()
    with pytest.raises(ValueError, match="memory_pad_token_id=2: keep at least 3"):
        model.resize_token_embeddings(2)
    model.save_pretrained(tmp_path)
    read = EngramForCausalLM.from_pretrained(tmp_path, placement="file")
    with pytest.raises(ValueError, match="placement='host'"):
        read.resize_token_embeddings(70)
    for each in (model, read):
        assert each.config.vocab_size == len(each.get_input_embeddings().weight) == VOCABULARY
        each(input_ids=torch.tensor([[3, 4]]))


def test_a_copy_is_resized_alone(ids):
    model = train(make())
    other = copy.deepcopy(model)
    expected = logits(model, ids)
    other.resize_token_embeddings(70)
    assert torch.equal(logits(other, ids)[..., :VOCABULARY], expected)
    assert torch.equal(logits(model, ids), expected) and model.config.vocab_size == VOCABULARY


def test_an_embedding_wider_than_its_tokenizer(folded, tmp_path):
    """Known ids read the rows that they read in a model as wide as the tokenizer."""
    config = EngramConfig.from_preset("nano", vocabulary=folded, vocab_size=80)
    narrow = EngramConfig.from_preset("nano", vocabulary=folded)
    most = narrow.spec.most_classes
    assert config.spec.layers == narrow.spec.layers and config.spec.compressed_vocab_size == min(48, most)
    model = EngramForCausalLM(config, folded).eval()
    assert model.memory_stack.vocabulary[VOCABULARY:].tolist() == [min(new, most - 1) for new in range(32, 48)]
    model.save_pretrained(tmp_path)
    again = EngramForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[3, 79, 64]])
    torch.testing.assert_close(logits(again, ids), logits(model, ids), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="pass the map of the tokenizer"):
        EngramForCausalLM(config, np.arange(VOCABULARY))


def test_the_map_alone():
    assert resize(np.array([0, 1, 1, 2]), 6, 100).tolist() == [0, 1, 1, 2, 3, 4]
    assert resize(np.array([0, 1, 1, 2]), 7, 4).tolist() == [0, 1, 1, 2, 3, 3, 3]
    assert resize(np.array([0, 1, 1, 2]), 3, 100).tolist() == [0, 1, 1]
