"""Windows with boundaries, and the hash: compressed token ids to row ids.

For B rows of T new tokens, orders up to N, `columns` = (N - 1) * heads:

    canonical_ids  raw ids [B, T]               -> ids [B, T]               P[x]; DEAD where not alive
    windows        ids [B, T], tail [B, N - 1]  -> windows [B, T, N]        column j: the token j places back
    hash_windows   windows [B, T, N]            -> row ids [B, T, columns]  offsets included
    hash_rows      the same for torch tensors, compiled on a CPU
    next_tail      ids [B, T], tail [B, N - 1]  -> tail [B, N - 1]          of the next call, newest last

A window ends at the start of the document and at the first dead token: that place and all places further back
are DEAD, and a DEAD place is hashed as the pad id (Engram paper section 2.2 for the sequence start;
DeepSeek-V4.1's code for masked tokens; documents in a packed row are our rule). A dead token's own window is
all DEAD. It has row ids, but its gate is closed. Ids may be negative here (the demo lets them pass): the
modulo is the floor modulo. `canonical_ids` refuses them.

Every function takes NumPy arrays or torch tensors on any device and returns the same kind: the operations are
the same int64 operations, and the tests hold both against a twin in Python integers.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import numpy as np
import torch

from byrote.address.spec import DEAD, LayerAddress
from byrote.compiled.loops import numba_is_there

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def canonical_ids(vocabulary: Array, input_ids: Array, alive: Array | None = None) -> Array:
    """Compressed ids. A dead position's raw id does not matter; any other must be in the vocabulary."""
    if _compilable(input_ids) and (alive is None or (alive.dtype == torch.bool and alive.shape == input_ids.shape)):
        return _compiled_canonical_ids(vocabulary, input_ids, alive)
    check_known(input_ids, len(vocabulary), alive)
    xp = _namespace(input_ids)
    if alive is None:
        return vocabulary[input_ids]
    return xp.where(alive, vocabulary[xp.where(alive, input_ids, 0)], DEAD)


def _compiled_canonical_ids(vocabulary: Any, input_ids: Any, alive: Any) -> Any:
    from byrote.address import loops

    out = torch.empty_like(input_ids, memory_format=torch.contiguous_format)
    living = np.empty(0, bool) if alive is None else alive.contiguous().view(-1).numpy()
    ids = input_ids.contiguous().view(-1).numpy()
    if not loops.canonical_ids(vocabulary.numpy(), ids, living, out.view(-1).numpy()):
        check_known(input_ids, len(vocabulary), alive)
    return out


def check_known(input_ids: Array, vocab_size: int, alive: Array | None = None) -> None:
    """Refuse ids that the vocabulary does not have, but for dead positions."""
    xp = _namespace(input_ids)
    if not str(input_ids.dtype).endswith(("int32", "int64")):
        raise ValueError(f"input_ids has dtype {input_ids.dtype}; give int64 or int32")
    unknown = (input_ids < 0) | (input_ids >= vocab_size)
    if alive is not None:
        _check_mask("alive", alive, input_ids)
        unknown = unknown & alive
    if bool(unknown.any()):
        row, position = (int(index) for index in xp.argwhere(unknown)[0])
        raise ValueError(
            f"input_ids[{row}, {position}] is {int(input_ids[row, position])}; the vocabulary has the ids "
            f"0 .. {vocab_size - 1}: mask the position, use the tokenizer of this vocabulary, or, where tokens were "
            "added to it, call model.resize_token_embeddings(len(tokenizer))"
        )


def windows(ids: Array, starts: Array, tail: Array | None, max_order: int) -> Array:
    """By a compiled loop where a tensor lies in host memory and no graph is traced."""
    if _compilable(ids):
        return _compiled_windows(ids, starts, tail, max_order)
    return plain_windows(ids, starts, tail, max_order)


def plain_windows(ids: Array, starts: Array, tail: Array | None, max_order: int) -> Array:
    seen, document = _with_tail(ids, starts, tail, max_order)
    behind, tokens = max_order - 1, ids.shape[1]
    xp = _namespace(ids)
    columns = [ids]
    for back in range(1, max_order):
        place = slice(behind - back, behind - back + tokens)
        columns.append(xp.where(document[:, place] == document[:, behind:], seen[:, place], DEAD))
    return xp.stack(columns, -1)


def _compiled_windows(ids: Any, starts: Any, tail: Any, max_order: int) -> Any:
    tail = _checked_tail(ids, starts, tail, max_order)
    from byrote.address import loops

    out = ids.new_empty(*ids.shape, max_order)
    ids, starts, tail = (array.contiguous().numpy() for array in (ids, starts, tail))
    loops.windows(ids, starts, tail, out.numpy())
    return out


def hash_windows(windows: Array, layer: LayerAddress, pad_id: int) -> Array:
    xp = _namespace(windows)
    _check_order(windows, layer)
    ids = xp.where(windows == DEAD, pad_id, windows)
    mix = ids[..., 0] * layer.multipliers[0]
    mixes = []
    for back in range(1, len(layer.multipliers)):
        mix = mix ^ ids[..., back] * layer.multipliers[back]
        mixes.append(mix)
    # A compiler traces with fake tensors, which must not enter the cache.
    constants = _constants.__wrapped__ if torch.compiler.is_compiling() else _constants
    primes, offsets = constants(layer, windows.device if isinstance(windows, torch.Tensor) else None)
    hashes = xp.remainder(xp.stack(mixes, -1)[..., None], primes)
    return hashes.reshape(*windows.shape[:-1], layer.columns) + offsets


def hash_rows(windows: torch.Tensor, layer: LayerAddress, pad_id: int) -> torch.Tensor:
    """`hash_windows` of a tensor, by a compiled loop where it lies in host memory and no graph is traced."""
    if not _compilable(windows):
        return hash_windows(windows, layer, pad_id)
    _check_order(windows, layer)
    from byrote.address import loops

    multipliers, primes, offsets = _tables(layer)
    rows = torch.empty(*windows.shape[:-1], layer.columns, dtype=torch.int64)
    flat, out = windows.reshape(-1, len(multipliers)).contiguous(), rows.view(-1, layer.columns)
    loops.hash_windows(flat.numpy(), multipliers, primes, offsets, pad_id, out.numpy())
    return rows


def next_tail(ids: Array, starts: Array, tail: Array) -> Array:
    """Trailing dead tokens (right padding) leave no trace; a row without a living token keeps its tail."""
    behind = tail.shape[1]
    seen, document = _with_tail(ids, starts, tail, behind + 1)
    xp = _namespace(ids)
    places = _arange(seen.shape[1], ids)
    # The place of the last living token; the last place of the tail where there is none.
    last = xp.amax(xp.where(ids == DEAD, behind - 1, places[behind:]), 1)[:, None]
    kept = last - behind + 1 + places[:behind]
    rows = _arange(len(ids), ids)[:, None]
    return xp.where(document[rows, kept] == document[rows, last], seen[rows, kept], DEAD)


def _with_tail(ids: Array, starts: Array, tail: Array | None, max_order: int) -> tuple[Array, Array]:
    """The tail and the new ids in one row [B, N - 1 + T], and the number of the document that each is in.

    A dead token opens a document of its own, shared with the tokens after it until the next start: nothing
    looks past it, and what looks at it finds DEAD.
    """
    xp = _namespace(ids)
    tail = _checked_tail(ids, starts, tail, max_order)
    opens = xp.concatenate([tail == DEAD, starts | (ids == DEAD)], 1)
    return xp.concatenate([tail, ids], 1), xp.cumsum(opens, 1)


def _checked_tail(ids: Array, starts: Array, tail: Array | None, max_order: int) -> Array:
    xp = _namespace(ids)
    _check_mask("starts", starts, ids)
    if tail is None:
        return xp.broadcast_to(xp.full_like(ids[:, :1], DEAD), (len(ids), max_order - 1))
    if tuple(tail.shape) != (len(ids), max_order - 1):
        raise ValueError(f"tail has shape {list(tail.shape)}; give [B, max_order - 1] = [{len(ids)}, {max_order - 1}]")
    return tail


@functools.lru_cache
def _constants(layer: LayerAddress, device: torch.device | None) -> tuple[Any, Any]:
    """Primes [N - 1, heads] and offsets [columns] where the ids are: made once, from Python integers."""
    if device is None:
        return np.array(layer.primes, dtype=np.int64), np.array(layer.offsets, dtype=np.int64)
    return torch.tensor(layer.primes, device=device), torch.tensor(layer.offsets, device=device)


@functools.lru_cache
def _tables(layer: LayerAddress) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (np.array(layer.multipliers, dtype=np.int64), *_constants(layer, None))


def _compilable(array: Any) -> bool:
    plain = type(array) is not torch.Tensor or array.device.type != "cpu" or torch.compiler.is_compiling()
    return not plain and array.dtype == torch.int64 and numba_is_there()


def _check_order(windows: Any, layer: LayerAddress) -> None:
    if windows.shape[-1] != len(layer.multipliers):
        raise ValueError(
            f"windows has {windows.shape[-1]} places; layer {layer.layer_id} needs max_order = {len(layer.multipliers)}"
        )


def _check_mask(name: str, mask: Array, ids: Array) -> None:
    if not str(mask.dtype).endswith("bool") or mask.shape != ids.shape:
        raise ValueError(
            f"{name} is {mask.dtype} {list(mask.shape)}; give bool, in the shape {list(ids.shape)} of the ids"
        )


def _arange(count: int, like: Array) -> Any:
    return torch.arange(count, device=like.device) if isinstance(like, torch.Tensor) else np.arange(count)


def _namespace(array: Array) -> Any:
    return torch if isinstance(array, torch.Tensor) else np
