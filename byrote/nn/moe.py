"""DeepSeekMoE: many small routed experts, a few per token, beside shared ones that see every token.

2401.06066 section 3; DeepSeek-V3 eqs. 12-13 (the residual is the caller's):

    y = shared(x) + sum_{i in ids(x)} gate_i expert_i(x),   expert(x) = W_down (silu(W_gate x) * (W_up x))

The routed experts are two stacked parameters and one grouped matrix product each: the (token, expert)
pairs are sorted by expert, stably, multiplied group by group, and gathered back. Everything that moves
rows is a gather, forward and backward: fast, and no sum depends on the order in which threads arrive. The
shared experts are one MLP as wide as all of them together (`shared_width`).

Shapes: x [B, T, d] -> y [B, T, d], counts int64 [E], balance loss [B].
Left out: expert parallelism, capacity and token dropping, biases.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byrote.compiled.loops import run
from byrote.nn.router import Router, load, sequence_balance_loss
from byrote.ops.dispatch import one_loop


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Spread(torch.autograd.Function):
    """x [N, d] -> [N K, d]: row i is x[order[i] // K], a copy of each token for each of its K experts.

    `order` sorts the N K (token, expert) pairs by expert, `place` says where each pair went. Spread and collect are
    each other's gradient. Autograd would find a scatter-add instead, slower and on a GPU in no fixed order.
    """

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order, place)
        return x.index_select(0, order // (len(order) // len(x)))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, place = ctx.saved_tensors
        return _Collect.apply(gradient, order, place), None, None


class _Collect(torch.autograd.Function):
    """y [N K, d] -> [N, d]: the sum of the K rows of each token; place [N, K]."""

    @staticmethod
    def forward(ctx, y: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order, place)
        return F.embedding_bag(place, y.contiguous(), mode="sum")

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, place = ctx.saved_tensors
        return _Spread.apply(gradient, order, place), None, None


class Experts(nn.Module):
    """gate_up [E, 2w, d] (the gate's w rows first) and down [E, d, w], as released checkpoints stack them."""

    def __init__(self, hidden_size: int, width: int, num_experts: int) -> None:
        super().__init__()
        for field, size in (("hidden_size", hidden_size), ("expert_width", width)):
            if size < 8 or size % 8:
                raise ValueError(f"{field}={size}: give a multiple of 8, grouped_mm wants rows of 16 bytes in bfloat16")
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, width))
        for weight in (self.gate_up, self.down):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    @torch.compiler.disable  # torch 2.13 traces grouped_mm in bfloat16 only, and how many pairs are few is data
    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """x [N, d], ids and gates [N, K] -> sum_k gates_k expert_{ids_k}(x), [N, d]."""
        if x.dtype == torch.float64:  # which grouped_mm does not know
            return self.loop(x, ids, gates)
        if self._few(x, ids):
            return self.each(x, ids, gates)
        experts = torch.arange(self.gate_up.shape[0], device=ids.device)
        by_expert, order = ids.flatten().sort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device)).view_as(ids)
        ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)

        gate_up: Tensor = self.gate_up
        down: Tensor = self.down
        if torch.is_autocast_enabled(x.device.type):  # which does not know grouped_mm
            # On a CPU the experts stay as they are: many small products are slower in bfloat16 than in float32.
            dtype = gate_up.dtype if x.device.type == "cpu" else torch.get_autocast_dtype(x.device.type)
            x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
        rows = _Spread.apply(x, order, place)
        gate_up = F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
        # Weighing the w numbers before the down projection is cheaper than the d after it, and the same.
        weight = _Spread.apply(gates.reshape(-1, 1), order, place.view(-1, 1)).squeeze(1)
        gate, up = gate_up.chunk(2, dim=-1)
        hidden = (F.silu(gate) * up * weight.unsqueeze(-1)).to(down.dtype)
        out = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends)
        return _Collect.apply(out, order, place)

    def _few(self, x: Tensor, ids: Tensor) -> bool:
        """On a CPU a grouped product visits every expert; where that are more than pairs, visit the pairs."""
        return x.device.type == "cpu" and ids.numel() < len(self.gate_up)

    def each(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """`forward`, one pair after the other: decoding."""
        rows = []
        for token, (its_ids, its_gates) in enumerate(zip(ids.tolist(), gates, strict=True)):
            outs = []
            for expert, weight in zip(its_ids, its_gates, strict=True):
                gate, up = F.linear(x[token], self.gate_up[expert]).chunk(2)
                outs.append(F.linear((F.silu(gate) * up * weight).to(x.dtype), self.down[expert]))
            rows.append(torch.stack(outs).sum(dim=0))
        return torch.stack(rows)

    def loop(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """The slow twin of `forward`: one expert after the other."""
        y = torch.zeros_like(x)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            token, choice = (ids == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, down) * gates[token, choice, None]
            y = y.index_add(0, token, out.to(y.dtype))
        return y


class MoeStats(NamedTuple):
    """None and None in evaluation."""

    counts: Tensor | None  # int64 [E]: alive tokens that chose each expert, for `router.record`
    balance_loss: Tensor | None  # [B], one per sequence, unweighted


def mixture(layer: "DeepSeekMoE", x: Tensor) -> Tensor | None:
    """Router, experts and shared expert of one token a row, as one loop; of sigmoid scores and one group."""
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


class DeepSeekMoE(nn.Module):
    """forward(x [B, T, d], alive bool [B, T] or None) -> y [B, T, d], MoeStats.

    The load and the balance loss go out as values and stay nowhere on the module, because a checkpointed
    block runs its forward twice. The model calls `moe.router.record(stats.counts)` outside of the block. With
    re-entrant checkpointing only the tensors of a flat tuple carry gradients, so a block returns (x, *stats).
    """

    def __init__(
        self,
        hidden_size: int,
        expert_width: int,
        num_experts: int,
        top_k: int,
        shared_width: int = 0,
        *,
        scores: Literal["sigmoid", "softmax"] = "sigmoid",
        renormalize: bool = True,
        route_scale: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
    ) -> None:
        super().__init__()
        if shared_width < 0:
            raise ValueError(f"shared_width={shared_width}: give 0 for no shared experts, or a positive number")
        self.router = Router(
            hidden_size,
            num_experts,
            top_k,
            scores=scores,
            renormalize=renormalize,
            route_scale=route_scale,
            n_group=n_group,
            topk_group=topk_group,
        )
        self.experts = Experts(hidden_size, expert_width, num_experts)
        self.shared = MLP(hidden_size, shared_width) if shared_width else None

    def forward(self, x: Tensor, alive: Tensor | None = None) -> tuple[Tensor, MoeStats]:
        if not self.training:
            return self.evaluate(x), MoeStats(None, None)
        ids, gates, scores = self.router(x)
        stats = MoeStats(load(ids, scores.shape[-1], alive), sequence_balance_loss(scores, ids.shape[-1], alive))
        return self._sum(x, ids, gates), stats

    @one_loop(mixture)
    def evaluate(self, x: Tensor) -> Tensor:
        ids, gates, _ = self.router(x)
        return self._sum(x, ids, gates)

    def _sum(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        y = self.experts(x.flatten(0, 1), ids.flatten(0, 1), gates.flatten(0, 1)).view_as(x)
        return y if self.shared is None else y + self.shared(x)
