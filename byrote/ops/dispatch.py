"""Whether a loop may do the work of torch here: every condition, once.

A layer in `byrote.nn` is plain torch. What it does for one token a row, where calling torch costs more than the work, a
loop may do instead, which reads the layer's weights and calls nothing. So it stands in for nothing but what we made: a
layer that is wrapped, subclassed, hooked, patched, parametrized, quantized or offloaded has to be called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from byrote.compiled.loops import numba_is_there

Forward = Callable[..., Any]

_plain: ContextVar[frozenset[str] | None] = ContextVar("plain", default=frozenset())


@contextmanager
def plain_twins(*names: str) -> Iterator[None]:
    """Take the plain twin of the loops of these names, or of all: to compare with, to time them one by one, and to
    learn what float32 leaves open.
    """
    token = _plain.set(frozenset(names) if names else None)
    try:
        yield
    finally:
        _plain.reset(token)


def compilable(name: str, *tensors: Tensor) -> bool:
    """Whether the loop `name`, of float32 on a CPU, can take these tensors."""
    plain = _plain.get()
    if plain is None or name in plain or not numba_is_there():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(
        x.dtype is torch.float32 and x.device.type == "cpu" and type(x) in (Tensor, nn.Parameter) for x in tensors
    )


def learned(*tensors: Tensor) -> bool:
    """Whether a gradient will be asked for that passes one of them."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def weights(layer: nn.Module) -> list[nn.Parameter] | None:
    """All parameters of a layer that is, with all in it, exactly what we made: these say all that it does.

    None of another class (an adapter's wrapper, a parametrized or a quantized layer, a subclass), with a `forward` that
    was replaced (accelerate's offloading does so), a hook, a weight that is no plain parameter, or a bias, which no
    layer has that a loop reads.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return None
    found: list[nn.Parameter] = []
    return found if _collect(layer, found) else None


def _collect(layer: nn.Module, found: list[nn.Parameter]) -> bool:
    kind = type(layer)
    if kind is not nn.Linear and not kind.__module__.startswith("byrote.nn."):
        return False
    if kind.forward.__module__ != kind.__module__ or "forward" in layer.__dict__:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    for name, weight in layer._parameters.items():
        if weight is not None:
            if (name == "bias" and kind is nn.Linear) or type(weight) is not nn.Parameter:
                return False
            found.append(weight)
    return all(part is None or _collect(part, found) for part in layer._modules.values())


def matrix(layer: nn.Module) -> Tensor | None:
    """W of a layer that is x W^T and no more; None of one that must be called."""
    return layer.weight if type(layer) is nn.Linear and weights(layer) else None


def one_loop(loop: Forward) -> Callable[[Forward], Forward]:
    """Let `loop(layer, x, ...)` do the work of the layer's `forward(x, ...)` for one token a row, x [B, 1, ...].

    In evaluation, where nothing is learned, in float32 on a CPU, without autocast, of a layer whose `weights` say all.
    A loop that finds too much or something else to do answers None, and `forward` is called.
    """

    def decorate(forward: Forward) -> Forward:
        @wraps(forward)
        def chosen(layer: nn.Module, x: Tensor, *others: Any, **named: Any) -> Any:
            if not layer.training and x.dim() > 2 and x.shape[1] == 1:
                inputs = x, *others, *named.values()
                if _takes(loop.__name__, layer, inputs) and (done := loop(layer, x, *others, **named)) is not None:
                    return done
            return forward(layer, x, *others, **named)

        return chosen

    return decorate


def _takes(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> bool:
    if not compilable(name) or torch.is_autocast_enabled("cpu"):
        return False
    read = weights(layer)
    if read is None or not all(weight.is_contiguous() for weight in read):
        return False
    numbers = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()] + read
    return not learned(*numbers) and compilable(name, *numbers)
