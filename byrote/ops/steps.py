"""One token a row on a CPU: what a layer does between its projections, as one loop, where calling torch costs more.

Each function has the arguments of its layer's `forward` and answers what that does, or None where torch is as good. The
layers in `byrote.nn` hold the formulas and are the plain twins; `byrote.ops.dispatch` says when a loop is asked at all.
Inputs may lie in memory in any way; weights are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from byrote.compiled.loops import run
from byrote.ops.dispatch import compilable

Cache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Products of a layer with its tokens, and of all queries with all latents, and numbers of keys counted for each query
# head: up to so many a loop is as fast as torch, whose calls cost more than their work, or faster.
FEW_OF_A_LAYER, FEW_OF_LATENTS, FEW_OF_KEYS = 2**20, 2**22, 2**20


def latent_attention(
    layer: Any, x: Tensor, rotary: Tensor, mask: Tensor | None = None, cache: Cache | None = None
) -> Tensor | None:
    """`byrote.nn.mla.MLA`: absorbed queries and the new latent, then attention over the latents in the cache."""
    if cache is None or not layer.absorbs(1, cache):
        return None
    from byrote.ops.loops.mla import attend, enter

    rows, c, r = len(x), layer.latent_dim, layer.rope_dim
    query, query_rope = x.new_empty(rows, layer.num_heads, c), x.new_empty(rows, layer.num_heads, r)
    latent, rope_key = x.new_empty(rows, c), x.new_empty(rows, r)
    projected = layer.queries(x).reshape(rows, -1), layer.kv_a_proj(x).reshape(rows, -1)
    turns = torch.view_as_real(rotary.expand(rows, -1, -1)).reshape(rows, -1, 2).contiguous()
    norm, up = (layer.kv_a_norm.weight, layer.eps), layer.kv_b_proj.weight
    run(enter, *projected, turns, *norm, up, query, query_rope, latent, rope_key)

    latent, rope_key = cache(latent[:, None, None], rope_key[:, None, None])
    keys = latent.shape[2]
    if layer.num_heads * keys * c > FEW_OF_LATENTS or not compilable("latent_attention", latent, rope_key):
        mixed = layer.mixed(query[:, :, None], query_rope[:, :, None], latent, rope_key, mask)
        return layer.o_proj(layer.up(mixed).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
    seen = x.new_empty(rows, 0, dtype=torch.bool) if mask is None else mask.expand(rows, 1, 1, keys)
    cached = latent.squeeze(1).contiguous(), rope_key.squeeze(1).contiguous()
    out = x.new_empty(rows, layer.num_heads * layer.value_dim)
    run(attend, query, query_rope, *cached, seen.reshape(rows, -1).contiguous(), layer.softmax_scale, up, out)
    return layer.o_proj(out.unsqueeze(1))  # type: ignore[no-any-return]


def swiglu_layer(layer: Any, x: Tensor) -> Tensor | None:
    """`byrote.nn.moe.MLP`"""
    matrices = layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight
    if x.shape[-1] != matrices[0].shape[1] or x.numel() * len(matrices[0]) > FEW_OF_A_LAYER:
        return None
    from byrote.ops.loops.moe import mlp

    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    out = x.new_empty(tokens.shape)
    run(mlp, tokens, *matrices, out)
    return out.view(x.shape)


def mixture(layer: Any, x: Tensor, alive: Tensor | None = None) -> Tensor | None:
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


def memory(
    layer: Any,
    streams: Tensor,
    embeddings: Tensor,
    alive: Tensor | None = None,
    starts: Tensor | None = None,
    tail: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`byrote.nn.engram.Engram`: gates, gated value and short convolution."""
    if alive is None or starts is None or tail is None or not layer.kernel_size:
        return None
    from byrote.ops.loops.memory import step

    rows, (n, d) = len(streams), layer.query_gain.shape
    keys, value = (project(embeddings).contiguous() for project in (layer.key, layer.value))
    inputs = streams.contiguous().view(rows, n, d), keys.view(rows, n, d), value.view(rows, d)
    gains = layer.query_gain * layer.key_gain, layer.conv_gain, layer.conv_weight, layer.dilation
    before = tail.reshape(rows, layer.tail_length, n * d).contiguous()
    masks = [mask.reshape(rows).contiguous() for mask in (alive, starts)]
    options = layer.gate.zero_gate_rule == "copysign", layer.gate.eps, layer.conv_eps
    addend, columns = streams.new_empty(rows, n, d), streams.new_empty(rows, n * d)
    run(step, *inputs, *gains, before, *masks, *options, addend, columns)
    return addend.view(streams.shape), columns.view(rows, 1, n * d)


def grouped_attention(
    layer: Any, x: Tensor, rotary: Tensor, mask: Tensor | None = None, cache: Cache | None = None
) -> Tensor | None:
    """`byrote.nn.gqa.GroupedQueryAttention` behind a past."""
    if cache is None or rotary.shape[:2] != x.shape[:2]:
        return None
    from byrote.ops.loops.attend import attend, turn

    rows, n = len(x), layer.head_dim
    query, key, value = (project(x).reshape(rows, -1) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    turned = torch.empty_like(query), torch.empty_like(key)
    run(turn, query, key, rotary.reshape(rows, -1).contiguous(), *turned)
    query, key = turned
    keys, values = cache(*(new.view(rows, -1, 1, n) for new in (key, value)))
    slots = keys.shape[2]
    plain = query.numel() * slots > FEW_OF_KEYS or not compilable("grouped_attention", keys, values)
    if plain or (mask is not None and mask.dtype != torch.bool):
        return layer.read(query.view(rows, -1, 1, n), keys, values, mask, few=True)  # type: ignore[no-any-return]
    places, *storage = _in_storage(keys, values)
    seen = x.new_empty(rows, 0, dtype=torch.bool)
    if mask is not None:
        seen = mask.expand(rows, 1, 1, slots).reshape(rows, -1).contiguous()
    out = torch.empty_like(query)
    run(attend, query, *storage, 1, *places, seen, out)
    return layer.o_proj(out.unsqueeze(1))  # type: ignore[no-any-return]


def concept_attention(layer: Any, h: Tensor, key: Tensor, value: Tensor, places: Any) -> Tensor | None:
    """`byrote.nn.concept_attention.ConceptAttention`"""
    heads = layer.q_proj.weight.shape[0] // layer.head_dim
    if len(h) * heads * layer.head_dim * key.shape[2] > FEW_OF_KEYS:
        return None
    from byrote.ops.loops.concepts import read

    rows = len(h)
    query = layer.q_proj(layer.token_norm(h)).reshape(rows, -1)
    shape, *storage = _in_storage(key, value)
    tokens = [x.reshape(-1).contiguous() for x in (places.token_document, places.token_position)]
    concepts = places.concept_document.contiguous(), places.concept_position.contiguous()
    norm, out = (layer.q_norm.weight, layer.q_norm.eps), torch.empty_like(query)
    run(read, query, *norm, *storage, 1, *shape, *tokens, *concepts, layer.weighting == "replicated", out)
    return layer.o_proj(out.unsqueeze(1))  # type: ignore[no-any-return]


def boundary(
    layer: Any, h: Tensor, starts: Tensor, alive: Tensor, tail: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`byrote.nn.boundary.BoundaryHead`"""
    from byrote.ops.loops.concepts import boundary as loop

    query, key = layer.project(h)
    before = query.new_zeros(len(h), query.shape[2]) if tail is None else tail[:, 0].to(query.dtype)
    p = query.new_empty(query.shape[:2])
    run(loop, *(x.contiguous() for x in (query, key, before, starts, alive)), p)
    return p, query


def _in_storage(key: Tensor, value: Tensor) -> tuple[tuple[int, int, int, int], Tensor, Tensor]:
    """((G, S, rows of n numbers from one row of the batch to the next, from one group to the next), keys and values
    [B, G, S, n] as they lie in memory, [X, n]).
    """
    _, groups, slots, n = key.shape
    if key.stride() != value.stride() or key.stride()[2:] != (n, 1) or key.stride(0) % n or key.stride(1) % n:
        key, value = key.contiguous(), value.contiguous()
    in_row, in_group = key.stride(0) // n, key.stride(1) // n
    length = (len(key) - 1) * in_row + (groups - 1) * in_group + slots
    shape, apart = (length, n), (n, 1)
    return (groups, slots, in_row, in_group), key.as_strided(shape, apart), value.as_strided(shape, apart)
