import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
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


def _words(ids: dict[str, int], kind: str = "wordlevel") -> Tokenizer:
    """A tokenizer of whole words, with these ids."""
    model = (
        models.WordPiece(ids, unk_token="<unk>") if kind == "wordpiece" else models.WordLevel(ids, unk_token="<unk>")
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize("kind", ["wordlevel", "wordpiece"])
def test_ids_with_holes(kind):
    """The map goes to the largest id; an id that no token has is like no other."""
    ids = {"<unk>": 0, "the": 1, "The": 4, "THE": 9}
    mapped = compress(_words(ids, kind))
    assert mapped.tolist() == [0, 1, 2, 3, 1, 4, 5, 6, 7, 1]


def test_added_tokens_far_behind_the_others():
    content = json.loads(_words({"<unk>": 0, "the": 1}).to_str())
    about = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [{"id": 6, "content": "<|tool|>", "special": True, **about}]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    mapped = compress(tokenizer)
    assert len(mapped) == 1 + max(tokenizer.encode("the <|tool|>").ids) == len(set(mapped.tolist()))


def test_a_tokenizer_without_tokens():
    with pytest.raises(ValueError, match="has no tokens: train it first"):
        compress(Tokenizer(models.BPE()))
