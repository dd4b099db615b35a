"""One token a row on a CPU: what a layer does between its projections, as one loop, where calling torch costs more.

Each function has the arguments of the layer's method that it stands in for, and answers what that does, or None where
torch is as good. The layers in `byrote.nn` hold the formulas and are the plain twins; `byrote.ops.dispatch` says when a
loop is asked at all.
Inputs may lie in memory in any way; weights are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from byrote.compiled.loops import run

Cache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def latent_attention(
    layer: Any, x: Tensor, rotary: Tensor, mask: Tensor | None = None, cache: Cache | None = None, shares: Any = None
) -> Tensor | None:
    """`byrote.nn.mla.MLA`: absorbed queries, rotations and the norm of the new latent."""
    if shares is not None or cache is None or not layer.absorbs(1, cache):
        return None
    from byrote.ops.loops.mla import enter

    rows, c, r = len(x), layer.latent_dim, layer.rope_dim
    query, query_rope = x.new_empty(rows, layer.num_heads, c), x.new_empty(rows, layer.num_heads, r)
    latent, rope_key = x.new_empty(rows, c), x.new_empty(rows, r)
    projected = layer.queries(x).reshape(rows, -1), layer.kv_a_proj(x).reshape(rows, -1)
    turns = torch.view_as_real(rotary.expand(rows, -1, -1)).reshape(rows, -1, 2).contiguous()
    norm, up = (layer.kv_a_norm.weight, layer.kv_a_norm.eps), layer.kv_b_proj.weight
    run(enter, *projected, turns, *norm, up, query, query_rope, latent, rope_key)

    latent, rope_key = cache(latent[:, None, None], rope_key[:, None, None])
    mixed = layer.mixed(query[:, :, None], query_rope[:, :, None], latent, rope_key, mask)
    return layer.o_proj(layer.up(mixed).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


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
