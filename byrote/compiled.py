"""Compiled loops: whether they can run, and how they are run over the tokens of a tensor.

numba is a dependency, but nothing that a GPU runs needs it: where it cannot be installed, every compiled loop gives
way to its plain twin, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


_plain: ContextVar[bool] = ContextVar("plain", default=False)


@cache
def numba_is_there() -> bool:
    return find_spec("numba") is not None


@contextmanager
def plain_twins() -> Iterator[None]:
    """Take the plain twin of every loop over tokens: to compare with, and to learn what float32 leaves open."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@cache
def kernels(name: str) -> Any:
    """The file of compiled loops `byrote.nn.kernels.<name>`, which needs numba, imported when it is first wanted."""
    return import_module(f"byrote.nn.kernels.{name}")


def compilable(*tensors: Tensor) -> bool:
    """Whether a loop of float32 on the CPU can take them."""
    import torch

    if torch.compiler.is_compiling() or any(x.dtype is not torch.float32 or x.device.type != "cpu" for x in tensors):
        return False
    return numba_is_there() and not _plain.get()


def learned(*tensors: Tensor) -> bool:
    """Whether a gradient will be asked for that passes one of them."""
    import torch

    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def decoding(*tensors: Tensor) -> bool:
    """Whether a loop of float32 on the CPU can take them, and nothing is learned from the call."""
    import torch

    return not learned(*tensors) and compilable(*tensors) and not torch.is_autocast_enabled("cpu")


def replaceable(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a loop may do the work of a module without calling it: it is of that kind, and has no hooks."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


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
