"""How a token reads the concepts: attention from tokens to the concepts formed so far, added to the encoder's state.

DLCM (2512.24617) sections 3.5.2 and 4, equations 12 to 17. Token t, encoder state h, concept k with smoothed state z:

    q = RMSNorm(W_Q norm(h)),  k = RMSNorm(W_K norm(z)),  v = W_V norm(z)        the RMSNorms on each head, with a gain
    y = h + W_O [o_1 ; ... ; o_H],   o_i = sum_k share_k v_k                      no positions; heads grouped as in GQA

A token sees the concepts of its document that formed at its own position or before. Two weightings of them:

    uniform      share_k ~ exp(q k / sqrt(d))                 equation 14
    replicated   share_k ~ n_k(t) exp(q k / sqrt(d))          equation 17: K and V are repeated for every token, so that
                 attention is a causal one of tokens to tokens. n_k(t) counts the tokens up to t whose newest concept
                 was k; it adds log n_k(t) to a score, a thing the paper does not mention and its kernel does

Four kernels that give the same: `dense`, by plain products; `sdpa`, torch's attention with a mask over [T, M]; `flex`,
FlexAttention (compiled; on a CPU without a backward); `varlen`, flash attention on CUDA over replicated keys, packed
documents and all. Tokens with a past have more keys than that, so that `varlen` leaves them to `sdpa`, as all leave a
few to `dense`. Where a kernel cannot run, it says so.

Shapes: h [B, T, d_t]; key, value [B, H_kv, M, n]; -> [B, T, d_t].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from byrote.nn.gqa import FEW, attend, attend_few, split_heads
from byrote.nn.norm import RMSNorm

Weighting = Literal["replicated", "uniform"]
Kernel = Literal["dense", "sdpa", "flex", "varlen"]
WEIGHTINGS, KERNELS = ("replicated", "uniform"), ("dense", "sdpa", "flex", "varlen")

NOWHERE = -1  # the document of a concept that is none


@dataclass(frozen=True)
class Places:
    """Where tokens and concepts stand: document and position id of tokens [B, T], and of the tokens at which the
    concepts formed, [B, M], ascending in a document; the document of padding is NOWHERE.
    """

    token_document: Tensor
    token_position: Tensor
    concept_document: Tensor
    concept_position: Tensor

    def visible(self) -> Tensor:
        """bool [B, T, M]: may the token see the concept?"""
        same = self.token_document[:, :, None] == self.concept_document[:, None, :]
        return same & (self.concept_position[:, None, :] <= self.token_position[:, :, None])

    def multiplicity(self) -> Tensor:
        """int64 [B, T, M]: how many tokens up to this one have the concept as their newest; below 1 where not visible.

        Positions count tokens, so that nothing has to be counted: a concept is the newest from its own position until
        the next of its document forms.
        """
        until = torch.full_like(self.concept_position, torch.iinfo(torch.int64).max)
        goes_on = self.concept_document[:, 1:] == self.concept_document[:, :-1]
        until[:, :-1] = torch.where(goes_on, self.concept_position[:, 1:], until[:, :-1])
        end = torch.minimum(self.token_position[:, :, None] + 1, until[:, None, :])
        return end - self.concept_position[:, None, :]

    def bias(self, weighting: Weighting, dtype: torch.dtype) -> Tensor:
        """What is added to the scores, [B, 1, T, M]: -inf where nothing is seen, log n_k(t) if replicated."""
        visible = self.visible()
        if weighting == "replicated":
            weight = self.multiplicity().clamp_min(1).to(dtype).log()
        else:
            weight = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        hidden = ~visible & visible.any(dim=-1, keepdim=True)  # who sees nothing, padding, must stay finite
        return weight.masked_fill(hidden, float("-inf")).unsqueeze(1)

    def goes_on(self, first: Tensor) -> bool:
        """Does any of the tokens `first`, bool [B, T], see a concept that formed before it?"""
        rows, steps = first.nonzero(as_tuple=True)
        older = self.concept_position[rows] < self.token_position[rows, steps][:, None]
        return bool((older & (self.concept_document[rows] == self.token_document[rows, steps][:, None])).any())

    def newest(self) -> Tensor:
        """int64 [B, T]: the newest concept that each token sees, 0 where none."""
        order = torch.arange(self.concept_document.shape[1], device=self.concept_document.device)
        return torch.where(self.visible(), order, 0).amax(dim=-1)


class ConceptAttention(nn.Module):
    """Attention of T tokens over the concepts before them: hidden [B, T, d], concepts [B, S, D] -> [B, T, d] (see
    above).
    """

    def __init__(
        self,
        hidden_size: int,
        concept_size: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        weighting: Weighting = "replicated",
        kernel: Kernel = "sdpa",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting={weighting!r}: it must be one of {WEIGHTINGS}")
        if kernel not in KERNELS:
            raise ValueError(f"kernel={kernel!r}: it must be one of {KERNELS}")
        self.head_dim, self.weighting, self.kernel = head_dim, weighting, kernel
        self.token_norm = RMSNorm(hidden_size, eps=eps)
        self.concept_norm = RMSNorm(concept_size, eps=eps)
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(concept_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(concept_size, num_key_value_heads * head_dim, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=eps)
        self.k_norm = RMSNorm(head_dim, eps=eps)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def keys(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H_kv, M, n] of concepts [B, M, d_c]: all that a later token needs of them."""
        z = self.concept_norm(z)
        key, value = (split_heads(layer(z), self.head_dim) for layer in (self.k_proj, self.v_proj))
        return self.k_norm(key), value

    def forward(self, h: Tensor, key: Tensor, value: Tensor, places: Places) -> Tensor:
        """What is to be added to h, [B, T, d_t]."""
        query = self.q_norm(split_heads(self.q_proj(self.token_norm(h)), self.head_dim))
        key, value = key.to(query.dtype), value.to(query.dtype)
        kernel = KERNEL_FUNCTIONS[self.kernel]
        if h.shape[1] <= FEW:  # decoding
            kernel = dense
        out = kernel(query, key, value, places, self.weighting)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def dense(query: Tensor, key: Tensor, value: Tensor, places: Places, weighting: Weighting) -> Tensor:
    bias = places.bias(weighting, torch.promote_types(query.dtype, torch.float32))
    return attend_few(query, key, value, bias)


def sdpa(query: Tensor, key: Tensor, value: Tensor, places: Places, weighting: Weighting) -> Tensor:
    return attend(query, key, value, places.bias(weighting, query.dtype))


def replicated(query: Tensor, key: Tensor, value: Tensor, places: Places) -> Tensor:
    """Equation 17 to the letter, for tokens without a past: each token's newest concept stands at its place, and tokens
    attend to the tokens of their document before them. The twin of log n_k(t).
    """
    newest = places.newest()[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[-1])
    key, value = key.gather(2, newest), value.gather(2, newest)
    document, steps = places.token_document, torch.arange(query.shape[2], device=query.device)
    mask = (document[:, :, None] == document[:, None, :]) & (steps[:, None] >= steps)
    return attend(query, key, value, mask.unsqueeze(1))


def flex(query: Tensor, key: Tensor, value: Tensor, places: Places, weighting: Weighting) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    if query.device.type == "cpu" and any(x.requires_grad for x in (query, key, value)) and torch.is_grad_enabled():
        raise ValueError("kernel='flex' has no backward on a CPU: use 'sdpa', or evaluate under torch.no_grad()")
    rows, _, tokens, _ = query.shape
    visible, counts = places.visible(), places.multiplicity().clamp_min(1).to(query.dtype).log()

    def sees(b: Tensor, h: Tensor, t: Tensor, k: Tensor) -> Tensor:
        return visible[b, t, k]

    def weigh(score: Tensor, b: Tensor, h: Tensor, t: Tensor, k: Tensor) -> Tensor:
        return score + counts[b, t, k]

    block_mask = create_block_mask(sees, rows, None, tokens, key.shape[2], device=query.device.type)
    return _flex()(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        score_mod=weigh if weighting == "replicated" else None,
        block_mask=block_mask,
        enable_gqa=query.shape[1] != key.shape[1],
    )


@cache
def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def varlen(query: Tensor, key: Tensor, value: Tensor, places: Places, weighting: Weighting) -> Tensor:
    if query.device.type != "cuda" or weighting != "replicated" or query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"kernel='varlen' is flash attention over replicated keys, on CUDA in 16 bits; got "
            f"weighting={weighting!r}, {query.dtype} on {query.device.type}: use 'sdpa'"
        )
    from torch.nn.attention.varlen import varlen_attn

    rows, heads, tokens, dim = query.shape
    cut = torch.ones_like(places.token_document, dtype=torch.bool)
    cut[:, 1:] = places.token_document[:, 1:] != places.token_document[:, :-1]
    if places.goes_on(cut):
        return sdpa(query, key, value, places, weighting)
    newest = places.newest()[:, None, :, None].expand(-1, key.shape[1], -1, dim)
    # (rows x tokens, heads, n), cut where a document or a row begins.
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (query, key.gather(2, newest), value.gather(2, newest))]
    packed[1:] = [x.repeat_interleave(heads // key.shape[1], dim=1) for x in packed[1:]]
    ends = torch.cat([cut.flatten().nonzero().squeeze(1), cut.new_tensor([cut.numel()], dtype=torch.int64)]).int()
    longest = int(ends.diff().max())
    renamed = "window_size" in inspect.signature(varlen_attn).parameters  # of is_causal, which older torch has
    causal: dict[str, Any] = {"window_size": (-1, 0)} if renamed else {"is_causal": True}
    call: Callable[..., Tensor] = varlen_attn  # type: ignore[assignment]
    return call(*packed, ends, ends, longest, longest, **causal).view(rows, tokens, heads, dim).transpose(1, 2)


KERNEL_FUNCTIONS: dict[str, Callable[..., Tensor]] = {"dense": dense, "sdpa": sdpa, "flex": flex, "varlen": varlen}
