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

from byrote.nn.eager import Shares, attend_eagerly
from byrote.nn.mla import Cache
from byrote.nn.rope import rotate

# Up to so many queries, plain products over the keys as they lie in the cache are faster than torch's attention.
FEW = 16


class GroupedQueryAttention(nn.Module):
    """x [B, T, d] -> [B, T, d]; ValueError unless the key heads divide the query heads and the head width is even."""

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
        query, key, value = (split_heads(layer(x), self.head_dim) for layer in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache(key, value)
        if mask is None and key.shape[2] != x.shape[1] > 1:
            raise ValueError(
                f"mask=None with {key.shape[2]} keys for {x.shape[1]} queries: give the mask, only a "
                "forward without a past, or of a single token, can go without"
            )
        if shares is not None:
            out = attend_eagerly(query, key, value, mask, self.head_dim**-0.5, shares)
        else:
            few = cache is not None and x.shape[1] <= FEW and (mask is not None or x.shape[1] == 1)
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
