"""One token a row on a CPU: what a layer does as one loop, where calling torch costs more than its work.

A function has the arguments of the layer's method that it stands in for, and answers what that does, or None where
torch is as good. The layers in `byrote.nn` hold the formulas and are the plain twins; `byrote.ops.dispatch` says when a
loop is asked at all. Inputs may lie in memory in any way; weights are contiguous.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from byrote.compiled.loops import run


def mixture(layer: Any, x: Tensor) -> Tensor | None:
    """`byrote.nn.moe.DeepSeekMoE` with sigmoid scores and one group: router, experts and shared expert."""
    router, experts, shared = layer.router, layer.experts, layer.shared
    number, _, width = experts.gate_up.shape
    if router.scores != "sigmoid" or router.n_group > 1 or x.shape[-1] != width or len(x) * router.top_k >= number:
        return None
    from byrote.ops.loops.moe import moe

    its = [x.new_empty(0, 0)] * 3
    if shared is not None:
        its = [shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight]
    tokens = x.reshape(-1, width).contiguous()
    out = x.new_empty(tokens.shape)
    routing = router.weight, router.selection_bias, router.top_k, router.renormalize, float(router.route_scale)
    run(moe, tokens, *routing, experts.gate_up, experts.down, *its, out)
    return out.view(x.shape)
