"""The tokenizer of a corpus: a byte-level BPE trained on it, or any Hugging Face fast tokenizer.

Specials of a trained one: <|bos|> = 0, <|eos|> = 1, <|pad|> = 2. `tokenizer(text)` puts <|bos|> in front,
as in training. A document is bos + tokens + eos. Training is deterministic: the same texts in the same
order give the same file.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"


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


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """A tokenizer folder, or a name that AutoTokenizer knows. It must be fast and have an end-of-text
    token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer can be loaded from {path}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer {path} is not a fast one; byrote needs a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {path} has no eos_token; documents cannot be ended: set one and save it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """bos + tokens + eos of each text, int32. Where the tokenizer has no bos, its eos stands in.

    Text that spells a special token ("<|eos|>") stays text: only we may end a document.
    """
    backend = tokenizer.backend_tokenizer
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = before
    return [np.array([bos, *encoding.ids, tokenizer.eos_token_id], np.int32) for encoding in encodings]
