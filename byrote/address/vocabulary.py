"""Canonical token ids ("tokenizer compression"): P maps a raw token id to the id of its class.

Engram paper (arXiv 2601.07372) section 2.2 and appendix C; the exact chain is that of the released code,
where the paper says only "NFKC, lowercasing, etc.". Two tokens are in one class when their keys are equal:

    key = the normalised decoded text;
          the decoded text itself where the normalised text is empty; the tokenizer's raw token string where
          the decoded text holds U+FFFD (a token that is part of a character).

Classes are numbered 0, 1, 2, ... in the order of their first token. The map is used for addresses alone: a
model's inputs and targets keep raw ids. An id that no token has, between those of others, is a class of its own;
ids behind the last token (padding of an embedding matrix, tokens that are added later) have no entry until
`resize` gives them one.

Shapes: `compress` returns int64 [largest id + 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers

_SENTINEL = "\ue000"  # private use: keeps a text that is one space alive through the stripping

# The tokenizers library, not `unicodedata`: its accent stripping drops Mn, Mc and Me, its lowercasing knows
# no final sigma, and its stripping uses Rust's white space. Another Unicode table can change a class, and
# with it every address.
_NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), _SENTINEL),
        normalizers.Strip(),
        normalizers.Replace(_SENTINEL, " "),
    ]
)


def normalize(text: str) -> str:
    """The eight-step chain alone; an empty result means that the text itself becomes the key."""
    return _NORMALIZER.normalize_str(text)


def compress(tokenizer: Any) -> np.ndarray:
    """The map P of a Hugging Face fast tokenizer or of a `tokenizers.Tokenizer`."""
    # The Rust backend, because a wrapper's decode may clean up spaces.
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__} without a Rust backend; "
            "pass a Hugging Face fast tokenizer or a tokenizers.Tokenizer"
        )
    present = backend.get_vocab(with_added_tokens=True).values()
    if not present:
        raise ValueError("the tokenizer has no tokens: train it first")
    ids = range(max(present) + 1)
    texts = backend.decode_batch([[token_id] for token_id in ids], skip_special_tokens=False)
    return compress_texts(texts, (backend.id_to_token(token_id) for token_id in ids))


def compress_texts(texts: Iterable[str], raw_tokens: Iterable[str | None]) -> np.ndarray:
    """The map P from what every single id decodes to, and from its raw token string; None for an id without a token."""
    classes: dict[str | int, int] = {}
    compressed = []
    for token_id, (text, raw) in enumerate(zip(texts, raw_tokens, strict=True)):
        key: str | int = normalize(text) or text
        if raw is None:
            key = token_id
        elif "\ufffd" in text:
            key = raw
        compressed.append(classes.setdefault(key, len(classes)))
    return np.array(compressed, dtype=np.int64)


def resize(vocabulary: np.ndarray, vocab_size: int, most_classes: int) -> np.ndarray:
    """The map [vocab_size] with further ids, each a class of its own up to `most_classes`, the rest in the last; or cut
    short.
    """
    classes = int(vocabulary.max()) + 1
    further = np.arange(classes, classes + max(0, vocab_size - len(vocabulary)), dtype=np.int64)
    return np.concatenate([vocabulary[:vocab_size], further.clip(max=most_classes - 1)])


def vocabulary_digest(vocabulary: np.ndarray) -> str:
    """SHA-256 of the map as little-endian int64: the certificate that two machines compress alike."""
    return hashlib.sha256(np.ascontiguousarray(vocabulary, dtype="<i8").tobytes()).hexdigest()
