"""Which experts a token goes to, with what weight, and how the load stays even.

DeepSeekMoE (2401.06066 section 3); DeepSeek-V2 section 2.2, -V3 section 2.1.2; loss-free balance 2408.15664.

    s    = sigmoid(x W^T) or softmax(x W^T)              affinities, float32 also under autocast
    ids  = the top_k of s + b                            b: the selection bias; it never weighs an expert
    gate = route_scale * s[ids] (/ sum s[ids] if renormalize)

Groups (node-limited routing): the experts lie in n_group equal groups; only the topk_group best may be
chosen from. A group is worth the sum of its two best s + b with sigmoid scores (V3; the paper says K/M,
the released code two) and its best one with softmax scores (V2).

Bias, after each optimizer step, with c_i the tokens that went to expert i over all ranks and accumulated
batches:

    b <- b + rate * (v - mean(v)),  v = sign(mean(c) - c)   less its mean (Moonlight, app. C): b cannot drift

Sequence-wise balance loss (V3 eqs. 17-20), per sequence of T tokens that are alive, s' = s / sum s:

    loss = sum_i f_i P_i,  f_i = E / (K T) sum_t 1[i in TopK(s_t)],  P_i = 1/T sum_t s'_it

TopK there is of the unbiased s and knows no groups, as eq. 18 has it. A row of the batch is one sequence,
also when it is packed. The weight alpha is the caller's.

Shapes: x [..., d] -> ids, gates [..., K], scores [..., E].
Left out: token dropping, expert-level and device-level losses.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Chooses top_k of E experts for each token: x [..., d] -> ids and gates [..., k], scores [..., E] (see above)."""

    selection_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scores: Literal["sigmoid", "softmax"] = "sigmoid",
        renormalize: bool = True,
        route_scale: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
    ) -> None:
        super().__init__()
        if scores not in ("sigmoid", "softmax"):
            raise ValueError(f"scores={scores!r} is unknown: give 'sigmoid' or 'softmax'")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} of num_experts={num_experts}: give 1 <= top_k <= num_experts")
        if n_group < 1 or num_experts % n_group:
            raise ValueError(f"n_group={n_group} does not divide num_experts={num_experts}: give a divisor of it")
        if not 1 <= topk_group <= n_group:
            raise ValueError(f"topk_group={topk_group} of n_group={n_group}: give 1 <= topk_group <= n_group")
        if top_k > topk_group * (num_experts // n_group):
            raise ValueError(
                f"top_k={top_k} experts do not fit in topk_group={topk_group} groups of "
                f"{num_experts // n_group}: lower top_k or raise topk_group"
            )
        self.top_k, self.num_experts = top_k, num_experts
        self.scores, self.renormalize, self.route_scale = scores, renormalize, route_scale
        self.n_group, self.topk_group = n_group, topk_group
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        self.register_buffer("selection_bias", torch.zeros(num_experts, dtype=torch.float32))
        # No buffer: DistributedDataParallel would overwrite every rank's counts with those of rank 0.
        self.counts: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if self.scores == "sigmoid" else logits.softmax(dim=-1)
        ids = self._select(scores.detach() + self.selection_bias)
        gates = scores.gather(-1, ids)
        if self.renormalize:
            gates = gates / (gates.sum(dim=-1, keepdim=True) + 1e-20)
        return ids, gates * self.route_scale, scores

    def _select(self, biased: Tensor) -> Tensor:
        if self.n_group > 1:
            grouped = biased.unflatten(-1, (self.n_group, -1))
            deciding = min(2, grouped.shape[-1]) if self.scores == "sigmoid" else 1
            worth = grouped.topk(deciding, dim=-1).values.sum(dim=-1)
            best = worth.topk(self.topk_group, dim=-1).indices
            closed = torch.ones_like(worth, dtype=torch.bool).scatter(-1, best, False)
            biased = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
        return biased.topk(self.top_k, dim=-1).indices

    def record(self, counts: Tensor) -> None:
        """Add one forward's load to what the next `update_bias` sees; in evaluation do nothing.

        `forward` does not do this itself: under activation checkpointing it runs twice. The model's own
        forward, outside of the checkpointed block, does not.
        """
        if self.training:
            self.counts = counts if self.counts is None else self.counts + counts

    @torch.no_grad()
    def update_bias(self, rate: float) -> Tensor:
        """Move the bias by the load of all ranks, forget the load; return MaxVio = max(c) / mean(c) - 1."""
        bias = self.selection_bias
        counts = self.counts if self.counts is not None else torch.zeros_like(bias, dtype=torch.int64)
        self.counts = None
        if dist.is_available() and dist.is_initialized():
            counts = counts.clone()
            dist.all_reduce(counts)
        total = counts.sum()
        direction = torch.sign(total - self.num_experts * counts).to(bias)
        bias += rate * (direction - direction.mean())
        return (self.num_experts * counts.max() - total) / total.clamp(min=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # Steps of 0.001 vanish in half precision, so .half() and .to(bfloat16) keep the bias as it is.
        exact = self.selection_bias
        super()._apply(fn, recurse)
        if self.selection_bias.dtype != torch.float32:
            self.selection_bias = exact.to(self.selection_bias.device)
        return self


def load(ids: Tensor, num_experts: int, alive: Tensor | None = None) -> Tensor:
    """How many (alive) tokens chose each expert: int64 [E]."""
    weight = torch.ones_like(ids) if alive is None else alive.unsqueeze(-1).expand_as(ids).long()
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids.flatten(), weight.flatten())


def sequence_balance_loss(scores: Tensor, k: int, alive: Tensor | None = None) -> Tensor:
    """scores [B, T, E], alive bool [B, T] -> one loss per sequence [B]; 0 where nothing is alive."""
    experts = scores.shape[-1]
    chosen = torch.zeros_like(scores).scatter(-1, scores.detach().topk(k, dim=-1).indices, 1.0)
    shares = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    weight = torch.ones_like(scores[..., :1]) if alive is None else alive.unsqueeze(-1).to(scores.dtype)
    tokens = weight.sum(dim=1).clamp(min=1)
    frequency = (chosen * weight).sum(dim=1) * (experts / k) / tokens
    return (frequency * (shares * weight).sum(dim=1) / tokens).sum(dim=-1)
