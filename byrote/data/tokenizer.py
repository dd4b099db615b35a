"""The tokenizer of a corpus: a byte-level BPE trained on it, or any Hugging Face fast tokenizer.

Specials of a trained one: <|bos|> = 0, <|eos|> = 1, <|pad|> = 2. A document is bos + tokens + eos; where a tokenizer
has no bos, its eos stands in. Text that spells a special token ("<|eos|>") stays text, in training and in a prompt:
only we may end a document. Training is deterministic: the same texts in the same order give the same file.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
REPLACED = "\ufffd"  # in place of bytes that are no character
LONGEST = 8  # tokens over which characters are looked for


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    if vocab_size < 256 + 3:
        raise ValueError(
            f"vocab_size is {vocab_size}; a byte-level vocabulary needs at least 259 (256 bytes, 3 specials)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def open_tokenizer(path: str | Path) -> Any:
    """A tokenizer folder, or a name that AutoTokenizer knows; ValueError where none can be loaded."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # what Rust says of a damaged tokenizer.json is an Exception and nothing narrower
        raise ValueError(f"no tokenizer can be loaded from {path}: {error}") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """A tokenizer folder, or a name that AutoTokenizer knows. It must be fast and have an end-of-text
    token.
    """
    tokenizer = open_tokenizer(path)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer {path} is not a fast one; byrote needs a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {path} has no eos_token; documents cannot be ended: set one and save it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """bos + tokens + eos of each text, int32."""
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    return [np.array([_start(tokenizer), *encoding.ids, tokenizer.eos_token_id], np.int32) for encoding in encodings]


def encode_prompt(tokenizer: Any, text: str, document: bool = True) -> list[int]:
    """Ids of a text to be read or continued, as a document begins in training; with `document` false, as the tokenizer
    of a model that we did not train begins one.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text!r} is no Unicode text; give it in UTF-8") from None
    if not document:
        return tokenizer(text, split_special_tokens=True)["input_ids"]
    start = _start(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids if start is None else [start, *ids]


def shown(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token. A character whose bytes lie in several tokens is shown at the first of them, and the
    others as a dot.
    """
    texts = [tokenizer.decode([token]) for token in ids]
    at = 0
    while at < len(ids):
        if REPLACED not in texts[at]:
            at += 1
            continue
        end = at + 1
        while end < min(len(ids), at + LONGEST) and REPLACED in tokenizer.decode(ids[at:end]):
            end += 1
        whole = tokenizer.decode(ids[at:end])
        if REPLACED not in whole:
            texts[at:end] = [whole] + ["·"] * (end - at - 1)
        at = end if REPLACED not in whole else at + 1
    return texts


def _start(tokenizer: Any) -> int | None:
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
