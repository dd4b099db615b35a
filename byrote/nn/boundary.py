"""Where concepts begin and end: probabilities of boundaries, their sampling, and the loss that holds their rate.

DLCM (2512.24617) sections 3.3.1 and 3.3.3; for token t with encoder state h_t, the token before it in its document:

    q_t = W_q h_t,  k_t = W_k h_t                                equation 5
    p_t = (1 - cos(q_{t-1}, k_t)) / 2,  p = 1 at a document's first token                    6
    training    b_t ~ Bernoulli(sharp(p_t)),  sharp(p) = p^(1/tau) from 1/2 on, else 1 - (1 - p)^(1/tau)
    inference   b_t = [p_t >= 1/2]

The paper sharpens without saying how; this form and tau = 6 are ConceptMoE's (2601.21420, equations 5 and 6), from the
same lab. W_q and W_k start as one and the same orthonormal matrix (the identity where they are square, as in H-Net), so
that p starts as the distance of neighboring states. Without matrices, q = k = h, it is the rule of section 8.1.

The global parser, equations 8 to 10: over all T tokens of a step, of all ranks and micro-batches, without padding,

    G = sum p / T,  F = sum b / T,  L = R / (R - 1) [(R - 1) F G + (1 - F)(1 - G)] - 1

L is linear in G and F carries no gradient, so each token's share of it needs only the numbers F T and T of the whole
step, and the shares add up to L: its gradient is exact however the step is split.

Everything is float32 at least: near p = 1/2 the noise of bfloat16 would flip boundaries, and all that follows.
Shapes: h [B, T, d]; p, b, starts, alive [B, T]; tail [B, 1, s].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BoundaryHead(nn.Module):
    """`scan_size` s: of q and k; 0 compares the states themselves, without parameters."""

    def __init__(self, hidden_size: int, scan_size: int) -> None:
        super().__init__()
        self.scan_size = scan_size
        self.query = self.key = None
        if scan_size:
            self.query = Exact(hidden_size, scan_size, bias=False)
            self.key = Exact(hidden_size, scan_size, bias=False)

    @torch.no_grad()
    def start(self) -> Tensor:
        """The matrix that W_q and W_k start as, [s, d]: orthonormal rows or columns."""
        assert self.query is not None
        scan, hidden = self.query.weight.shape
        if scan == hidden:
            return torch.eye(hidden)
        return nn.init.orthogonal_(torch.empty(scan, hidden))

    def forward(self, h: Tensor, starts: Tensor, alive: Tensor, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(p, 0 where not alive; q [B, T, s]). `tail`: the q of the token before, anything where there is none."""
        with torch.autocast(h.device.type, enabled=False):
            query, key = self._project(h.to(torch.promote_types(h.dtype, torch.float32)))
            before = torch.zeros_like(query[:, :1]) if tail is None else tail.to(query.dtype)
            before = torch.cat([before, query[:, :-1]], dim=1)
            cosine = (F.normalize(before, dim=-1) * F.normalize(key, dim=-1)).sum(dim=-1)
            p = ((1 - cosine) / 2).clamp(0, 1)
        return torch.where(starts, torch.ones_like(p), p).masked_fill(~alive, 0), query

    def _project(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """q and k of h, which is float32 at least."""
        return (h, h) if self.query is None or self.key is None else (self.query(h), self.key(h))


class Exact(nn.Linear):
    """In the precision of what it is given, whatever its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def sharpen(p: Tensor, tau: float) -> Tensor:
    """Nearer to 0 or 1, with 1/2 from above staying above: at tau = 6, 0.3 becomes 0.058 and 0.7 becomes 0.942."""
    high = p.clamp_min(0.5) ** (1 / tau)
    low = 1 - (1 - p.clamp_max(0.5)) ** (1 / tau)
    return torch.where(p >= 0.5, high, low)


@torch.no_grad()
def sample(p: Tensor, tau: float, generator: torch.Generator | None = None) -> Tensor:
    """b ~ Bernoulli(sharp(p)), bool; from torch's global generator unless one is given. p = 1 is always one."""
    noise = torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype)
    return noise < sharpen(p, tau)


def parser_loss(p: Tensor, boundaries: Tensor, alive: Tensor, ratio: float, counts: Tensor | None = None) -> Tensor:
    """These tokens' share of L at `ratio` R. `counts` [2]: (F T, T) of the whole step; of None, these are all.

    Where several processes' gradients are averaged, both counts have to be divided by the number of processes.
    """
    own = torch.stack([(boundaries & alive).sum(), alive.sum()]).to(torch.float64)
    total = own if counts is None else counts.to(own)
    rate, tokens = (total[0] / total[1].clamp_min(1)).to(p.dtype), total[1].clamp_min(1).to(p.dtype)
    mean, share = p.masked_fill(~alive, 0).sum() / tokens, own[1].to(p.dtype) / tokens
    return ratio / (ratio - 1) * (mean * (ratio * rate - 1) + share * (1 - rate)) - share
