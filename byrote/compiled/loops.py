"""Compiled loops: whether they can run, and how they are run over the tokens of a tensor.

numba is a dependency, but nothing that a GPU runs needs it: where it cannot be installed, every compiled loop gives
way to its plain twin, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@cache
def numba_is_there() -> bool:
    return find_spec("numba") is not None


def stepping(x: Tensor) -> bool:
    """Whether values of x can be looked at for nothing: a GPU would have to be waited for, a compiler has none."""
    import torch

    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def compiled(signature: str | None = None, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's njit, without the GIL, kept in a file where numba finds a place to write, else made anew in each process.

    With a signature it is compiled for these types, when it is first called, and Python alone can call it. Without, it
    is compiled for what it is called with, by other loops too.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if signature is None:
            return _made(function, (), options)
        made = cache(lambda: _made(function, (signature,), options))

        @wraps(function)
        def loop(*arguments: Any) -> Any:
            return made()(*arguments)

        return loop

    return decorate


def _made(function: Callable[..., Any], signature: tuple[str, ...], options: dict[str, Any]) -> Any:
    import numba

    njit: Any = numba.njit
    try:
        return njit(*signature, nogil=True, cache=True, **options)(function)
    except (RuntimeError, OSError):  # "no locator available", as in a container whose files are read-only; a full disk
        return njit(*signature, nogil=True, **options)(function)


def run(
    kernel: Callable[..., None],
    first: Tensor,
    *others: Tensor | float,
    sums: Sequence[Tensor] = (),
    tokens: int | None = None,
) -> None:
    """kernel(begin, end, first, *others, *sums) over all tokens, shared among as many threads as torch has.

    `tokens`: how many there are; of None, as many as `first` is long. Every token adds to `sums`: each thread has zeros
    of its own, which are added up in the end.
    """
    import torch

    arrays = [_numbers(x) if isinstance(x, torch.Tensor) else x for x in (first, *others)]
    tokens = len(first) if tokens is None else tokens
    if tokens < 64 and not sums:  # a step of decoding, where every step on the way counts
        return kernel(0, tokens, *arrays)
    threads = torch.get_num_threads() if tokens >= 64 * torch.get_num_threads() else 1
    if threads == 1:
        return kernel(0, tokens, *arrays, *(_numbers(total.zero_()) for total in sums))
    ends = [tokens * i // threads for i in range(threads + 1)]
    parts = [tensor.new_zeros(threads, *tensor.shape) for tensor in sums]

    def share(i: int) -> None:
        kernel(ends[i], ends[i + 1], *arrays, *(part[i].numpy() for part in parts))

    list(_pool(threads).map(share, range(threads)))
    for total, part in zip(sums, parts, strict=True):
        torch.sum(part, 0, out=total)


def _numbers(x: Tensor) -> Any:
    return x.detach().numpy() if x.requires_grad else x.numpy()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "byrote-loops")
