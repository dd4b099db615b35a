"""The anchor [1] of a table, and what becomes of the rows when models are averaged or copied into one another.

Such code goes over the parameters of two models and never meets a row: `swa_utils.AveragedModel`, the reference of
TR-DPO (2404.09656), `load_state_dict`. What it does to an anchor, it means for all rows of the table:

    average.anchor.lerp_(model.anchor, 0.1)     rows of the average <- 0.9 of its own + 0.1 of the model's

So the functions of torch that are linear are followed through anchors, their aliases (`.data`, `detach`) and what is
computed of them: each stands for a *mixture*, weights by table. What an anchor stands for, its rows become when they
are next read (`mixing.py`). The value of an anchor stays 0.

Left alone: a factor on an anchor by itself, which is an optimizer's decay, and values from elsewhere, as a file's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from byrote.memory.mixing import Mixing, Weights, rows_table, settle
from byrote.tables.placements.copied import original

SAME = {"detach", "clone", "to", "float", "double", "cpu", "cuda", "data", "copy"}  # of one tensor
LINEAR = {"add", "sub", "rsub", "mul", "div", "true_divide", "lerp", "addcdiv", "addcmul", "neg", "copy"}
LINEAR |= {"radd", "iadd", "isub", "rmul", "imul", "truediv", "itruediv"}  # the operators


class Mixed(Tensor):
    """A tensor that is followed. `weights`: the mixture at hand, by table; None if nothing linear. `writes`: how often
    each of the tables had been written. `memory`: the module whose anchor this is an alias of, if it is one.
    """

    memory: weakref.ref[Any] | None = None
    weights: Weights | None = {}  # noqa: RUF012  replaced, never changed
    writes: dict[Any, int] = {}  # noqa: RUF012  likewise

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, in_place = _name(func)
        if name not in LINEAR | SAME:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if isinstance(args[0], list | tuple):
            return _follow_lists(func, in_place, args, kwargs)
        if name in SAME and not in_place:
            return _same(func, args, kwargs)
        mixture = _mixture(func, name, in_place, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return _kept(result, mixture, args[0] if in_place else None)

    def bare(self) -> Tensor:
        """The same numbers as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).detach()  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = self._made_of(self.bare().clone())
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._made_of(self.bare()).__reduce_ex__(protocol)

    def _made_of(self, numbers: Tensor) -> Tensor:
        return nn.Parameter(numbers, self.requires_grad) if isinstance(self, nn.Parameter) else numbers


class Anchor(Mixed, nn.Parameter):
    """The parameter itself."""

    @staticmethod
    def tie(memory: Any) -> None:
        """Make the parameter `memory.anchor` stand for the rows of its table."""
        anchor = memory.anchor
        if type(anchor) is nn.Parameter:
            anchor.__class__ = Anchor
        if type(anchor) is Anchor and (anchor.memory is None or anchor.memory() is not memory):
            anchor.memory = weakref.ref(memory)


def plain(anchor: Tensor) -> Tensor:
    """The anchor for the graph of a forward, where nothing is followed."""
    if not isinstance(anchor, Mixed):
        return anchor
    with torch._C.DisableTorchFunctionSubclass():
        return anchor.as_subclass(Tensor)


def loaded(value: Any, memory: Any) -> Any:
    """What `load_state_dict` is to copy into the anchor: rows go with it only between copies of one table.

    Any other model's is taken as a file's would be, and leaves the tables to `load_tables`.
    """
    tables = list(_weights(value) or {}) if isinstance(value, Mixed) else []
    own = original(rows_table(memory))
    return value if all(original(table) is own for table in tables) else value.bare()


def _name(func: Callable[..., Any]) -> tuple[str, bool]:
    """The function's name without what says that it is an operator, in place or over lists; whether it is in place."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return getattr(func.__self__, "__name__", ""), name == "__set__"  # type: ignore[attr-defined]
    bare = name.strip("_").removeprefix("foreach_")
    dunder = name.startswith("__")
    return bare, (name.startswith("__i") if dunder else name.endswith("_")) and bare != "rsub"


def _same(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A tensor as it is, in another place or type: an alias of an anchor stands for the anchor."""
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
        alias = isinstance(result, Tensor) and result.data_ptr() == args[0].data_ptr() != 0
    memory = _memory(args[0]) if alias else None
    made = _kept(result, _weights(args[0]) if memory is None else {rows_table(memory): 1.0}, None)
    if memory is not None and isinstance(made, Mixed):
        made.memory = args[0].memory  # and while that is there, its rows
    return made


def _mixture(
    func: Callable[..., Any], name: str, in_place: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Weights | None:
    """What the result stands for: {} if for no rows, None if for nothing that is linear in rows."""
    if in_place and name in ("copy", "data"):
        return _weights(args[1])
    operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Mixed)]
    known = {id(x): _target(x) if in_place and x is args[0] else _weights(x) for x in operands}
    if any(weights is None for weights in known.values()):
        return None
    tables = list({table: None for weights in known.values() for table in weights or ()})

    def stand_in(x: Any, scale: float) -> Any:
        if isinstance(x, Mixed):
            weights = known[id(x)] or {}
            return torch.tensor([*(scale * weights.get(table, 0.0) for table in tables), 0.0], dtype=torch.float64)
        return x.detach().to("cpu", torch.float64) if isinstance(x, Tensor) else x

    once, twice = (
        func(*(stand_in(x, scale) for x in args), **{key: stand_in(x, scale) for key, x in kwargs.items()})
        for scale in (1.0, 2.0)
    )
    weights = dict(zip(tables, once.tolist()[:-1], strict=True))
    linear = not once[-1] and torch.allclose(twice, 2 * once)
    return weights if linear or len(tables) < 2 else None


def _weights(x: Any) -> Weights | None:
    """What an operand stands for: of an anchor or its alias, the rows as they are now."""
    memory = _memory(x)
    if memory is not None:
        if memory.mixing is not None and not memory.mixing.alone(rows_table(memory)):
            settle(memory)
        return {rows_table(memory): 1.0}
    if not isinstance(x, Mixed):
        return {}
    return None if any(table.followers.changes != writes for table, writes in x.writes.items()) else x.weights


def _target(x: Any) -> Weights | None:
    """What a tensor that is changed in place stands for: a factor may be followed by a sum."""
    memory = _memory(x)
    if memory is None:
        return _weights(x)
    return {rows_table(memory): 1.0} if memory.mixing is None else memory.mixing.weights


def _memory(x: Any) -> Any:
    return x.memory() if isinstance(x, Mixed) and x.memory is not None else None


def _kept(result: Any, mixture: Weights | None, target: Any) -> Any:
    """The result, marked with what it stands for; `target` if that was changed in place."""
    memory = _memory(target)
    if memory is not None:
        memory.mixing = Mixing(memory, mixture)
        return result
    if target is None and type(result) is Tensor and mixture != {}:
        target = result = result.as_subclass(Mixed)
    if isinstance(target, Mixed):
        target.weights = mixture
        target.writes = {table: table.followers.changes for table in mixture or {}}
    return result


def _follow_lists(func: Callable[..., Any], in_place: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function over lists of tensors, of which few stand for rows: those are followed one by one."""
    lists = [isinstance(x, list | tuple) for x in args]

    def single(*args: Any, **kwargs: Any) -> Tensor:
        made = func(*([x] if is_list else x for x, is_list in zip(args, lists, strict=True)), **kwargs)
        return args[0] if in_place else made[0]

    followed = []
    for i in range(len(args[0])):
        each = tuple(x[i] if is_list else x for x, is_list in zip(args, lists, strict=True))
        if any(isinstance(x, Mixed) for x in each):
            followed.append((i, each[0], _mixture(single, _name(func)[0], in_place, each, kwargs)))
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    for i, first, mixture in followed:
        kept = _kept(None if in_place else result[i], mixture, first if in_place else None)
        if not in_place:
            result[i] = kept
    return result
