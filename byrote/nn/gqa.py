"""Grouped-query attention: several query heads share one head of keys and values.

2305.13245; with as many key heads as query heads it is plain multi-head attention. Per token, hidden x, query head i of
H, key head j = i // (H / H_kv):

    q_i = RoPE(W_Q,i x),  k_j = RoPE(W_K,j x),  v_j = W_V,j x
    y   = W_O [o_1 ; ... ; o_H],  o_i = softmax(q_i . k_j / sqrt(d_head)) v_j

Positions rotate interleaved pairs (byrote.nn.rope), while transformers' Llama rotates halves: the same net with the
rows of W_Q and W_K in another order.

Shapes: x [B, T, d]; rotary [B, T, d_head / 2]; mask bool [B, 1, T, S], True where a query may look; -> [B, T, d].
Left out: biases, dropout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byrote.compiled import decoding, kernels, run
from byrote.nn.eager import Shares, attend_eagerly
from byrote.nn.mla import Cache
from byrote.nn.rope import rotate

# Up to so many queries, plain products over the keys as they lie in the cache are faster than torch's attention.
FEW = 16
# Numbers of keys, counted for each query head, up to which one compiled loop is as fast as torch's products, or faster.
FEW_NUMBERS = 2**20


class GroupedQueryAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        if num_key_value_heads < 1 or num_heads % num_key_value_heads:
            raise ValueError(
                f"num_heads={num_heads}, num_key_value_heads={num_key_value_heads}: "
                "give a number of key heads that divides the query heads"
            )
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim={head_dim}: give an even number, rotary dimensions go in pairs")
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        shares: Shares | None = None,
    ) -> Tensor:
        """Attend. Without a mask: plain causal over x, which then must be all there is; or one token, which sees all.

        `cache` takes the new keys and values [B, H_kv, T, d_head] and returns all S of each. `shares` takes the
        weights of the attention, which is then computed by plain products.
        """
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        few = shares is None and cache is not None and x.shape[1] <= FEW
        compiled = few and decoding(query, key) and rotary.shape[:2] == x.shape[:2]
        if compiled:
            turned = torch.empty_like(query), torch.empty_like(key)
            run(kernels("attend").turn, *(tensor.flatten(0, 1) for tensor in (query, key, rotary, *turned)))
            query, key = turned[0], split_heads(turned[1], self.head_dim)
        else:
            query, key = (rotate(split_heads(tensor, self.head_dim), rotary) for tensor in (query, key))
        value = split_heads(value, self.head_dim)
        if cache is not None:
            key, value = cache(key, value)
        if mask is None and key.shape[2] != x.shape[1] > 1:
            raise ValueError(
                f"mask=None with {key.shape[2]} keys for {x.shape[1]} queries: give the mask, only a "
                "forward without a past, or of a single token, can go without"
            )
        few = few and (mask is not None or x.shape[1] == 1)
        if compiled:
            if few and (out := attend_few_compiled(query, key, value, mask)) is not None:
                return self.o_proj(out)
            query = split_heads(query, self.head_dim)
        if shares is not None:
            out = attend_eagerly(query, key, value, mask, self.head_dim**-0.5, shares)
        else:
            out = attend_few(query, key, value, mask) if few else attend(query, key, value, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, H * n] -> [B, H, T, n]"""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of query [B, H, T, n] over key, value [B, H_kv, S, n] by torch's kernels; mask None: plain causal."""
    key, value = key.to(query.dtype), value.to(query.dtype)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
    )


def attend_few(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The same for few queries: the heads of a group are more queries of their one key head. A float mask is added.

    A query that a bool mask lets look nowhere gets 0, as torch's kernels give it; a float mask must leave it something.
    """
    batch, heads, tokens, dim = query.shape
    groups = key.shape[1]
    rows = query.reshape(batch, groups, -1, dim) * dim**-0.5
    scores = torch.matmul(rows, key.to(rows.dtype).mT).view(batch, heads, tokens, -1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None and mask.is_floating_point():
        scores = scores + mask
    elif mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    shares = scores.softmax(dim=-1)
    if mask is not None and not mask.is_floating_point():
        shares = shares.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    shares = shares.to(rows.dtype)
    out = torch.matmul(shares.view(batch, groups, -1, shares.shape[-1]), value.to(rows.dtype))
    return out.view(batch, heads, tokens, dim)


def attend_few_compiled(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor | None:
    """The same for query [B, T, H * n] and a bool mask, as one loop: [B, T, H * n]. None where a loop is not for it."""
    if query.shape[-1] * query.shape[0] * query.shape[1] * key.shape[2] > FEW_NUMBERS or not decoding(
        query, key, value
    ):
        return None
    if mask is not None and mask.dtype != torch.bool:
        return None
    rows, tokens, _ = query.shape
    places, *storage = in_storage(key, value)
    seen = query.new_empty(rows * tokens, 0, dtype=torch.bool)
    if mask is not None:
        seen = mask.expand(rows, 1, tokens, -1).reshape(rows * tokens, -1).contiguous()
    flat = query.flatten(0, 1)
    out = torch.empty_like(flat)
    run(kernels("attend").attend, flat, *storage, tokens, *places, seen, out)
    return out.view(query.shape)


def in_storage(key: Tensor, value: Tensor) -> tuple[tuple[int, int, int, int], Tensor, Tensor]:
    """((G, S, rows of n numbers from one row of the batch to the next, from one group to the next), keys and values
    as they lie in memory, [X, n]).
    """
    _, groups, slots, n = key.shape
    if key.stride() != value.stride() or key.stride()[2:] != (n, 1) or key.stride(0) % n or key.stride(1) % n:
        key, value = key.contiguous(), value.contiguous()
    in_row, in_group = key.stride(0) // n, key.stride(1) // n
    length = (len(key) - 1) * in_row + (groups - 1) * in_group + slots
    shape, apart = (length, n), (n, 1)
    return (groups, slots, in_row, in_group), key.as_strided(shape, apart), value.as_strided(shape, apart)
