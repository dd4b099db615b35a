import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from byrote.address import compress, normalize, vocabulary_digest


def test_normalizer_pairs(golden):
    assert len(golden["normalizer"]) == 84
    for pair in golden["normalizer"]:
        assert normalize(pair["text"]) == pair["normalized"], pair


@pytest.mark.parametrize(
    ("text", "normalized"), [("\u0391\u03a3", "\u03b1\u03c3"), ("a\x1f", "a\x1f"), ("\x85\u2028", "")]
)
def test_normalizer_is_not_pythons(text, normalized):
    assert normalize(text) == normalized


def test_synthetic_tokenizer(golden, vocabulary):
    expected = [token["compressed_id"] for token in golden["tokenizers"]["synthetic"]["tokens"]]
    assert vocabulary("synthetic").tolist() == expected


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4"])
def test_deepseek_tokenizers(golden, vocabulary, name):
    entry, compressed = golden["tokenizers"][name], vocabulary(name)
    assert len(compressed) == entry["len"]
    assert compressed.max() + 1 == entry["num_compressed"]
    assert vocabulary_digest(compressed) == entry["lookup_sha256"]
    for raw, expected in entry["samples"]:
        assert compressed[raw] == expected


def test_wrapper_and_backend_give_one_map():
    backend = Tokenizer(
        models.WordLevel({"<unk>": 0, "Apple": 1, "apple": 2, "\ufffda": 3, "\ufffdb": 4}, unk_token="<unk>")
    )
    backend.add_special_tokens([AddedToken("<bos>")])
    expected = [0, 1, 1, 2, 3, 4]
    assert compress(backend).tolist() == expected
    wrapper = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert compress(wrapper).tolist() == expected
    assert compress(wrapper).dtype == np.int64


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="fast tokenizer"):
        compress(object())
