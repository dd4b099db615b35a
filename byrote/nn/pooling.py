"""Tokens pooled into concepts, and what is done to concepts on the way to the deep transformer and back.

DLCM (2512.24617) sections 3.3.2 and 3.5.1. Boundaries b [B, T] cut the tokens of a document into segments; a boundary
forms one concept, the mean of a segment's encoder states (equation 7). Which segment is a convention:

    close     the boundary token is the last of its segment, and sees its concept. j(t) = sum b, as the paper prints
    open      the boundary token is the first of the next segment; what it sees is the mean of the segment before, or a
              learned vector where its document begins
    literal   the boundary token is the first of its segment, and sees its mean, as equations 7 and 17 say. That shows a
              token the ones after it: a control that must fail, with no way to decode

Either way every boundary forms exactly one concept, a document's first token is a boundary, and the tokens behind the
last boundary wait in an *open segment*, kept as a sum and a count, until a later one forms their concept. A segment
never reaches over the start of a document: what is left of the document before it is dropped.

Smoothing mixes a document's concepts z by the probability of the boundaries that formed them (H-Net's recursion; the
paper says no more than "lightweight"); p = 1 at a document's first, so that nothing comes over from the one before:

    y_k = p_k z_k + (1 - p_k) y_{k-1}                    y = W z + decay y_0,  W_kj = p_j prod_{j < i <= k} (1 - p_i)

Shapes: h [B, T, d]. N concepts of all rows in one flat list, by row and then by time; padded, [B, M, d].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from byrote.compiled.loops import stepping

Convention = Literal["close", "open", "literal"]
CONVENTIONS = ("close", "open", "literal")

# Of smoothing: 1 - p is never 0 but at a document's start, so that products can be found as sums of logarithms.
CLAMP = 1e-4


@dataclass(frozen=True)
class Formed:
    """The concepts that new tokens form: row and step [N], the token where each forms; rank [N], its number among those
    of its row; counts [B]. `whole`: there is one token a row, and each forms one, so that nothing has to be found.
    """

    row: Tensor
    step: Tensor
    rank: Tensor
    counts: Tensor
    whole: bool = False

    @classmethod
    @torch.compiler.disable
    def of(cls, boundaries: Tensor) -> Formed:
        rows, steps = boundaries.shape
        if steps == 1 and stepping(boundaries) and bool(boundaries.all()):
            zeros = torch.zeros(rows, dtype=torch.int64)
            return cls(torch.arange(rows), zeros, zeros, zeros + 1, whole=True)
        row, step = boundaries.nonzero(as_tuple=True)
        counts = boundaries.sum(dim=1)
        before = counts.cumsum(0) - counts
        return cls(row, step, torch.arange(len(row), device=row.device) - before[row], counts)

    @torch.compiler.disable
    def among(self, rows: Tensor) -> Formed:
        """The same, counted among `rows`: ascending, and all that form a concept are of them."""
        if self.whole:
            return self
        return Formed(torch.searchsorted(rows, self.row), self.step, self.rank, self.counts[rows])

    @torch.compiler.disable
    def at(self, x: Tensor) -> Tensor:
        """x [B, T, ...] at the tokens where concepts form, [N, ...]."""
        return x[:, 0] if self.whole else x[self.row, self.step]

    @torch.compiler.disable
    def pad(self, x: Tensor, empty: float = 0) -> Tensor:
        """x [N, ...] row by row, [B, M, ...], `empty` behind a row's last."""
        if self.whole:
            return x.unsqueeze(1)
        most = int(self.counts.max()) if len(self.row) else 0
        padded = x.new_full((len(self.counts), most, *x.shape[1:]), empty)
        return padded.index_put((self.row, self.rank), x)


@torch.compiler.disable
def pool(
    h: Tensor,
    formed: Formed,
    boundaries: Tensor,
    alive: Tensor,
    starts: Tensor,
    convention: Convention,
    waiting: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The mean of each new concept's tokens, [N, d] as h came; 0 where it has none (open, at a document's start).

    `waiting`: total [B, d] and count [B] of the open segment before these tokens.
    """
    if not len(formed.row):
        return h.new_zeros(0, h.shape[-1])
    if formed.whole:
        return _pool_one(h[:, 0], starts[:, 0], convention, waiting)
    seen = boundaries.cumsum(dim=1)
    # Which of its row's new concepts a token is pooled into, if there is that one.
    ordinal = {"close": seen - boundaries.long(), "open": seen, "literal": seen - 1}[convention]
    concept = (formed.counts.cumsum(0) - formed.counts)[:, None] + ordinal
    pooled = alive & (ordinal < formed.counts[:, None]) & (ordinal >= 0)
    begins = formed.at(starts)
    if convention != "literal":  # the first concept of a document takes nothing from the document before
        pooled &= ~begins[concept.where(pooled, 0)] | (starts if convention == "close" else False)
    index = pooled.flatten().nonzero().squeeze(1)
    sizes = torch.bincount(concept.flatten()[index], minlength=len(formed.row))
    states = h.flatten(0, 1).to(torch.promote_types(h.dtype, torch.float32))
    total = F.embedding_bag(index, states, sizes.cumsum(0) - sizes, mode="sum")
    if waiting is not None:
        goes_on = (formed.rank == 0) & ~begins
        total = total + waiting[0][formed.row] * goes_on[:, None]
        sizes = sizes + waiting[1][formed.row] * goes_on
    return (total / sizes.clamp_min(1)[:, None]).to(h.dtype)


def _pool_one(h: Tensor, starts: Tensor, convention: Convention, waiting: tuple[Tensor, Tensor] | None) -> Tensor:
    """`pool` of one token a row, h [B, d], at which each row's concept forms."""
    if convention == "literal":
        return h
    total, count = torch.zeros_like(h), torch.zeros_like(starts, dtype=torch.int64)
    if waiting is not None:
        total, count = waiting[0] * ~starts[:, None], waiting[1] * ~starts
    if convention == "close":
        total, count = total + h, count + 1
    return (total / count.clamp_min(1)[:, None]).to(h.dtype)


@torch.compiler.disable
def smooth(z: Tensor, p: Tensor, starts: Tensor, last: Tensor | None = None) -> Tensor:
    """y [B, M, d] of concepts z [B, M, d] with probabilities p [B, M]; `starts`: the first of a document.

    `last` [B, d]: the y before these. What stands behind a row's last concept is of no use to anyone.
    """
    dtype, wide = z.dtype, torch.float64
    if z.shape[1] == 1:
        return _smooth_one(z, p.to(torch.promote_types(dtype, torch.float32)), starts, last)
    p = p.to(wide).clamp(CLAMP, 1 - CLAMP).masked_fill(starts, 1)
    # In float64: over thousands of concepts the sums grow, and their differences are what counts.
    fades = torch.log1p(-p.masked_fill(starts, 0)).cumsum(dim=1)
    document = starts.cumsum(dim=1)
    order = torch.arange(p.shape[1], device=p.device)
    reaches = (document[:, :, None] == document[:, None, :]) & (order[:, None] >= order)
    weights = ((fades[:, :, None] - fades[:, None, :]).masked_fill(~reaches, float("-inf")).exp() * p[:, None, :]).to(
        dtype
    )
    with torch.autocast(z.device.type, enabled=False):  # one by one would be in the dtype of z too
        y = torch.matmul(weights, z)
    if last is None:
        return y
    decay = (fades.exp() * (document == 0)).to(dtype)
    return y + decay[..., None] * last.to(dtype)[:, None]


def _smooth_one(z: Tensor, p: Tensor, starts: Tensor, last: Tensor | None) -> Tensor:
    share = p.clamp(CLAMP, 1 - CLAMP).masked_fill(starts, 1)[..., None]
    y = share.to(z.dtype) * z
    return y if last is None else y + (1 - share).to(z.dtype) * last.to(z.dtype)[:, None]


def smooth_one_by_one(z: Tensor, p: Tensor, starts: Tensor, last: Tensor | None = None) -> Tensor:
    """The slow twin of `smooth`."""
    y, rows = torch.zeros_like(z[:, 0]) if last is None else last.to(z.dtype), []
    for k in range(z.shape[1]):
        share = p[:, k].to(z.dtype).clamp(CLAMP, 1 - CLAMP).masked_fill(starts[:, k], 1)[:, None]
        y = share * z[:, k] + (1 - share) * y
        rows.append(y)
    return torch.stack(rows, dim=1)
