"""Documents packed into batches [B, T], addressed by a counter.

Training is one endless stream of tokens: epoch 0, epoch 1, ... , each epoch all documents one after
another in an order drawn from (seed, epoch). Row r of batch s is the stream from (s B + r) T on, so that
a batch is a function of (seed, s) alone: to resume is to count on. Every token is an input exactly once
an epoch; rows and batches run on across documents and epochs.

position_ids restart at 0 where a document starts. A document that a row's end cuts goes on in the next
row, and its positions restart there too: the model sees nothing before a row, so the rest is a document
of its own to it. labels are the input ids, -100 at the first token of each document (nothing predicts
it); the model shifts them, so that the first token of a row is not predicted either.

Validation is one pass in the stored order. Its rows overlap by one token, the last of a row being the
first of the next, so that every token but a document's first is predicted exactly once, and the mean is
over all of the text. What is left at the end is a shorter row, a batch of its own: nothing is padded.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

IGNORED = -100
PREPARE_AGAIN = "delete the folder and prepare it again with `byrote data`"
Batch = dict[str, torch.Tensor]
Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, positions, labels


@dataclass(frozen=True)
class Tokens:
    """tokens [N] of all documents, offsets [documents + 1]: where each begins. `corpus`: the fingerprint that the
    whole corpus, tokenizer included, had when it was prepared.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    corpus: str = ""

    @classmethod
    def open(cls, folder: Path, part: str) -> "Tokens":
        """ValueError where the folder holds no prepared corpus, or a file of it is damaged."""
        path = folder / f"{part}.tokens.npy"
        if not path.exists():
            raise ValueError(f"{folder} holds no prepared corpus ({path.name} is missing); run `byrote data` first")
        tokens, offsets = _load(path), np.array(_load(folder / f"{part}.offsets.npy"))
        if offsets[:1] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 0).any():
            raise ValueError(f"{path} holds {len(tokens)} tokens, {part}.offsets.npy is of others; {PREPARE_AGAIN}")
        try:
            meta = json.loads((folder / "meta.json").read_text("utf-8"))
            return cls(tokens, offsets, str(meta.get("fingerprint", "")))
        except FileNotFoundError:
            return cls(tokens, offsets)
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder / 'meta.json'} is damaged ({error}); {PREPARE_AGAIN}") from None

    @cached_property
    def fingerprint(self) -> str:
        """Of these tokens as they are now, and of the corpus that they are of. Reads all of them, once."""
        state = hashlib.blake2b(self.corpus.encode(), digest_size=16)
        for array in (self.tokens, self.offsets):
            state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def predicted(self) -> int:
        """Tokens that something predicts: all but the first of each document."""
        return len(self) - (len(self.offsets) - 1)


def _load(path: Path) -> np.ndarray:
    """Integers [N], mapped."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); {PREPARE_AGAIN}") from None
    if array.ndim != 1 or array.dtype.kind != "i" or not len(array):
        raise ValueError(f"{path} is damaged (it holds {array.dtype} {list(array.shape)}); {PREPARE_AGAIN}")
    return array


def predicted(batch: Batch) -> int:
    """The number of tokens that the shifted loss of this batch is over."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


class Packer:
    """Training batches by number: `batch(s)` for s = 0, 1, 2, ... Rank r of `world` holds rows r, r +
    world, ...
    """

    def __init__(self, data: Tokens, batch_size: int, length: int, seed: int, rank: int = 0, world: int = 1):
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} is not divisible by the {world} processes; make it a multiple")
        if len(data) == 0:
            raise ValueError("the corpus holds no tokens")
        self.data, self.batch_size, self.length, self.seed = data, batch_size, length, seed
        self.rank, self.world = rank, world
        self._epoch = -1
        self._order = self._begins = np.empty(0, np.int64)

    def batch(self, step: int) -> Batch:
        rows = [self._row(step * self.batch_size + row) for row in range(self.rank, self.batch_size, self.world)]
        return _stack(rows)

    def epoch(self, step: int) -> float:
        """How many epochs have been read before batch `step`."""
        return step * self.batch_size * self.length / len(self.data)

    def _row(self, row: int) -> Row:
        at, end = row * self.length, (row + 1) * self.length
        pieces = []
        while at < end:
            epoch, offset = divmod(at, len(self.data))
            self._shuffle(epoch)
            place = int(np.searchsorted(self._begins, offset, side="right")) - 1
            document = self._order[place]
            skip = offset - int(self._begins[place])
            size = min(end - at, int(self._begins[place + 1]) - offset)
            start = int(self.data.offsets[document]) + skip
            pieces.append((self.data.tokens[start : start + size], skip == 0))
            at += size
        return _join(pieces)

    def _shuffle(self, epoch: int) -> None:
        """The order of an epoch's documents, and where in the epoch each begins. A row reads at most a
        few epochs in turn.
        """
        if epoch != self._epoch:
            count = len(self.data.offsets) - 1
            self._order = np.random.default_rng([self.seed, epoch]).permutation(count)
            self._begins = np.concatenate([[0], np.cumsum(np.diff(self.data.offsets)[self._order])])
            self._epoch = epoch


def validation_batches(data: Tokens, batch_size: int, length: int) -> Iterator[Batch]:
    """One pass over all documents; see the module's docstring."""
    starts = np.zeros(len(data), bool)
    starts[data.offsets[:-1]] = True

    def row(at: int, end: int) -> Row:
        cuts = [at, *(np.flatnonzero(starts[at + 1 : end]) + at + 1), end]
        return _join([(data.tokens[a:b], bool(starts[a])) for a, b in itertools.pairwise(cuts)])

    stride = length - 1
    whole, rest = divmod(len(data) - 1, stride)
    for first in range(0, whole, batch_size):
        yield _stack([row(i * stride, i * stride + length) for i in range(first, min(first + batch_size, whole))])
    if rest:
        yield _stack([row(whole * stride, len(data))])


def _join(pieces: list[tuple[np.ndarray, bool]]) -> Row:
    """(tokens, is it the beginning of a document?) of each piece -> ids, positions, labels of one row."""
    ids = np.concatenate([tokens for tokens, _ in pieces]).astype(np.int64)
    positions = np.concatenate([np.arange(len(tokens)) for tokens, _ in pieces])
    labels = ids.copy()
    at = 0
    for tokens, begins in pieces:
        if begins:
            labels[at] = IGNORED
        at += len(tokens)
    return ids, positions, labels


def _stack(rows: list[Row]) -> Batch:
    names = ("input_ids", "position_ids", "labels")
    return {name: torch.from_numpy(np.stack(part)) for name, part in zip(names, zip(*rows, strict=True), strict=True)}
