"""The product in the middle of a SwiGLU layer (2002.05202), weighed by one number a token.

    y = silu(gate) * up * weight,   silu(g) = g sigmoid(g)

Shapes: gate and up [..., w], or both side by side in gate [..., 2 w]; weight [...] or None for 1 -> y [..., w].
A compiled loop for float32 on a CPU; `plain_swiglu` is the twin, and what runs on a GPU, under torch.compile and in
other dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from byrote.compiled.loops import run
from byrote.ops.dispatch import compilable, learned


def swiglu(gate: Tensor, up: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    given = [x for x in (gate, up, weight) if x is not None]
    if not compilable("swiglu", *given):
        return plain_swiglu(gate, up, weight)
    if learned(*given):
        return _SwiGLU.apply(gate, up, weight)  # type: ignore[no-any-return]
    return _swiglu(gate, up, weight)


def plain_swiglu(gate: Tensor, up: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    product = F.silu(gate) * up
    return product if weight is None else product * weight.unsqueeze(-1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return _swiglu(gate, up, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        to_out = gradients[0].reshape(-1, gradients[0].shape[-1]).contiguous()
        inputs = _arrays(gate, up, weight)
        to_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        to_up = None if up is None else torch.empty_like(up, memory_format=torch.contiguous_format)
        to_weight = to_out.new_empty(len(to_out))
        outputs = to_gate.view(-1), (to_gate if to_up is None else to_up).view(-1), to_weight
        run(_loops().swiglu_backward, *inputs, to_out, *outputs, tokens=len(to_out))
        return to_gate, to_up, None if weight is None else to_weight.view(weight.shape)


def _swiglu(gate: Tensor, up: Tensor | None, weight: Tensor | None) -> Tensor:
    width = gate.shape[-1] // 2 if up is None else gate.shape[-1]
    out = gate.new_empty(*gate.shape[:-1], width)
    tokens = out.view(-1, width)
    run(_loops().swiglu, *_arrays(gate, up, weight), tokens, tokens=len(tokens))
    return out


def _arrays(gate: Tensor, up: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor, int, int, Tensor]:
    """Flat gates, flat values, the numbers a token has in them, where its values begin, and its weight."""
    pitch = gate.shape[-1]
    weights = _flat(gate.new_ones(gate.shape[:-1]) if weight is None else weight)
    if up is None:
        both = _flat(gate)
        return both, both, pitch, pitch // 2, weights
    return _flat(gate), _flat(up), pitch, 0, weights


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous()


def _loops() -> Any:
    from byrote.ops.loops import swiglu

    return swiglu
