"""Multi-head latent attention: the cache holds one latent and one rotary key per token, not one a head.

DeepSeek-V2 section 2.1 and appendix C; DeepSeek-V3 section 2.1.1. Per token, hidden x:

    c   = RMSNorm(W_DKV x)            the latent, d_c wide: keys and values of all heads
    k_R = RoPE(W_KR x)                one rotary key, d_R wide, shared by the heads, not normalized
    q_i = [W_UQ,i c_q ; RoPE(W_QR,i c_q)],  c_q = RMSNorm(W_DQ x), or x itself without a query latent
    k_i = [W_UK,i c ; k_R],  v_i = W_UV,i c
    y   = W_O [o_1 ; ... ; o_H],  o_i = sum_j softmax_j(scale q_i . k_ij) v_ij

Two ways to compute the same thing (DeepSeek-V3.2-Exp appendix A):

expanded  makes k_i and v_i of every head from the latents: training, and prefill of long chunks.
absorbed  moves W_UK into the query and W_UV behind the sum, so that one "head" of H*T queries reads the
          latents as they lie in the cache: keys [c ; k_R], values c. Decoding and short chunks. By plain
          products: torch's attention would need c and k_R side by side and, for want of a kernel with one
          key head this wide, copy and scale them at every token.

Which is cheaper follows from the multiplications per head for T queries over S cached tokens, S >> T:
expanded S d_c (d_nope + d_v) + T S (d_nope + d_R + d_v), absorbed T S (2 d_c + d_R). Hence absorb when
T (2 d_c - d_nope - d_v) < d_c (d_nope + d_v); at DeepSeek-V3's widths that is T <= 170.

Shapes: x [B, T, d]; rotary [B, T, d_R/2]; mask bool [B, 1, T, S], True where a query may look
(a query that may look nowhere gets 0); -> [B, T, d].
Left out: attention dropout, biases, the sqrt(d/rank) factors, which the released DeepSeek code lacks too.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byrote.nn.eager import Shares, attend_eagerly
from byrote.nn.norm import RMSNorm
from byrote.nn.rope import rotate
from byrote.ops.dispatch import matrix

Cache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class MLA(nn.Module):
    """Latent attention, x [B, T, d] -> [B, T, d]; ValueError where a width is not positive or the rotary one odd (see
    above).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        *,
        eps: float = 1e-6,
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "kv_lora_rank": kv_lora_rank,
            "qk_nope_head_dim": qk_nope_head_dim,
            "qk_rope_head_dim": qk_rope_head_dim,
            "v_head_dim": v_head_dim,
        }
        for field, size in sizes.items():
            if size < 1:
                raise ValueError(f"{field}={size}: give a positive number")
        if qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={qk_rope_head_dim}: give an even number, rotary dimensions go in pairs")
        if q_lora_rank is not None and q_lora_rank < 1:
            raise ValueError(f"q_lora_rank={q_lora_rank}: give a positive number, or None for no query latent")
        self.num_heads = num_heads
        self.latent_dim, self.nope_dim = kv_lora_rank, qk_nope_head_dim
        self.rope_dim, self.value_dim = qk_rope_head_dim, v_head_dim
        query_dim = qk_nope_head_dim + qk_rope_head_dim
        self.softmax_scale = query_dim**-0.5 if softmax_scale is None else softmax_scale
        # Overridable, so that a test can run either mode on any input.
        self.absorb: bool | None = None

        self.has_query_latent = q_lora_rank is not None
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, num_heads * query_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(q_lora_rank, eps=eps)
            self.q_b_proj = nn.Linear(q_lora_rank, num_heads * query_dim, bias=False)
        self.kv_a_proj = nn.Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_a_norm = RMSNorm(kv_lora_rank, eps=eps)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        shares: Shares | None = None,
    ) -> Tensor:
        """Attend. Without a mask: plain causal over x, which then must be all there is; one token sees all there is.

        `cache` takes the new latents [B, 1, T, d_c] and rotary keys [B, 1, T, d_R] and returns all S of each.
        `shares` takes the weights of the attention, which is then computed by plain products.
        """
        query, query_rope = self._heads(self._queries(x)).split([self.nope_dim, self.rope_dim], dim=-1)
        query_rope = rotate(query_rope, rotary)
        latent, rope_key = self.kv_a_proj(x).split([self.latent_dim, self.rope_dim], dim=-1)
        latent, rope_key = self.kv_a_norm(latent).unsqueeze(1), rotate(rope_key.unsqueeze(1), rotary)
        if cache is not None:
            latent, rope_key = cache(latent, rope_key)
        if mask is None and latent.shape[2] != x.shape[1] > 1:
            raise ValueError(
                f"mask=None with {latent.shape[2]} keys for {x.shape[1]} queries: give the mask, only a "
                "forward without a past, or of a single token, can go without"
            )
        inputs = query, query_rope, latent, rope_key, mask
        if shares is None and self.absorbs(x.shape[1], cache):
            out = self._absorbed(*inputs)
        else:
            out = self._expanded(*inputs, shares)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def absorbs(self, tokens: int, cache: Cache | None) -> bool:
        """Whether W_UK and W_UV are taken out of `kv_b_proj`. Where it is more than its matrix it must be called."""
        if self.absorb is False or (self.absorb is None and cache is None) or matrix(self.kv_b_proj) is None:
            return False
        expanded_dim = self.nope_dim + self.value_dim
        cheaper = tokens * (2 * self.latent_dim - expanded_dim) < self.latent_dim * expanded_dim
        return self.absorb or cheaper

    def _queries(self, x: Tensor) -> Tensor:
        if not self.has_query_latent:
            return self.q_proj(x)
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, H * n] -> [B, H, S, n]"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _expanded(
        self,
        query_nope: Tensor,
        query_rope: Tensor,
        latent: Tensor,
        rope_key: Tensor,
        mask: Tensor | None,
        shares: Shares | None,
    ) -> Tensor:
        key_nope, value = self._heads(self.kv_b_proj(latent.squeeze(1))).split([self.nope_dim, self.value_dim], dim=-1)
        rope_key = rope_key.to(key_nope.dtype).expand(-1, self.num_heads, -1, -1)
        query, key = torch.cat((query_nope, query_rope), dim=-1), torch.cat((key_nope, rope_key), dim=-1)
        if shares is not None:
            return attend_eagerly(query, key, value, mask, self.softmax_scale, shares)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and query_nope.shape[2] > 1,
            scale=self.softmax_scale,
        )

    def _absorbed(
        self, query_nope: Tensor, query_rope: Tensor, latent: Tensor, rope_key: Tensor, mask: Tensor | None
    ) -> Tensor:
        up_key, _ = self._up_projections()
        # The heads become more queries of the one key head.
        return self._up(self._mixed(torch.matmul(query_nope, up_key), query_rope, latent, rope_key, mask))

    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, n, c] and W_UV [H, v, c]"""
        both = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        up_key, up_value = both.split([self.nope_dim, self.value_dim], dim=1)
        return up_key, up_value

    def _up(self, mixed: Tensor) -> Tensor:
        return torch.matmul(mixed, self._up_projections()[1].transpose(1, 2))

    def _mixed(
        self, query: Tensor, query_rope: Tensor, latent: Tensor, rope_key: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Of absorbed queries [B, H, T, c]: the latents that each has mixed, of the same shape."""
        batch, _, tokens, _ = query.shape
        latent, rope_key = latent.to(query.dtype).squeeze(1), rope_key.to(query.dtype).squeeze(1)
        # One product added to the other, and both scaled, in the pass that writes them.
        rope_scores = torch.bmm(query_rope.flatten(1, 2), rope_key.mT)
        scale = self.softmax_scale
        scores = torch.baddbmm(rope_scores, query.flatten(1, 2), latent.mT, beta=scale, alpha=scale)
        scores = scores.view(batch, self.num_heads, tokens, -1)
        if mask is None and tokens > 1:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()[None, None]
        if mask is None:
            shares = scores.softmax(dim=-1, dtype=_at_least_float32(scores)).to(latent.dtype)
        else:
            shares = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=_at_least_float32(scores))
            shares = shares.masked_fill(~mask.any(dim=-1, keepdim=True), 0).to(latent.dtype)
        return torch.matmul(shares.flatten(1, 2), latent).view(query.shape)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
