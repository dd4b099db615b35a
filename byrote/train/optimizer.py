"""The one optimizer: a single `torch.optim.Optimizer`, with a `kind` in each param group.

    kind     what                                            rule
    adamw    matrices; and, without decay, the embedding,    AdamW (torch's own functional form)
             gains, biases, scales, the short convolution
    muon     if asked for: the hidden matrices               Muon; each block of a fused matrix on its own
    rows     the anchors of the tables                       the row rule, LazyAdam unless asked for another, on the
                                                             touched rows, 5x the rate, no decay

Hidden matrices are all 2-D weights (the router's too) and the stacked experts, but neither the embedding nor the
head that `get_output_embeddings` names. Fused: gate and up of the stacked experts, the keys of an Engram's streams.

Two wrapped optimizers would go stale: `accelerator.prepare` and `load_state_dict` replace `param_groups`, and a
schedule that holds the inner groups then moves nothing. Here every kind reads its rate from its own group at each step.

`step` also moves the selection bias of every router by the load it saw since the last step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from byrote.memory import Memory, MemoryStack
from byrote.memory.exchange import exchange, totals
from byrote.memory.identity import change_of
from byrote.nn.engram import Engram
from byrote.nn.moe import Experts
from byrote.nn.router import Router
from byrote.tables import LazyAdam, RowAdagrad, RowRule, SinkhornMomentum
from byrote.tables.cache import CachedTable
from byrote.tables.file import FileTable
from byrote.tables.rules import update_rows
from byrote.tables.sharded import ShardedTable
from byrote.train.guards import Guards
from byrote.train.muon import Muon
from byrote.train.mup import MuP


class Optimizer(torch.optim.Optimizer):
    """For any model that holds `byrote.memory.Memory` modules; also for one that holds none.

    `row_rate`: the tables' rate as a multiple of `lr` (Engram paper, table 5: 5). `row_max_norm`: bound on the norm of
    one row's gradient. `row_rule`: adam, adagrad or sinkhorn (`byrote.tables.rules`). `router_bias_rate`: step of the
    loss-free balance (DeepSeek-V3 section 4.2: 0.001). `muon`: the rule of the hidden matrices, AdamW's where there is
    none; `muon_rate`: their rate as a multiple of `lr`. `mup`: rates and eps by width, of a model with `mup_groups`.

    After a step, `rows_touched` counts the rows that it changed and `max_violation` is the mean MaxVio of the routers.
    """

    _step_supports_amp_scaling = True  # so that a GradScaler hands itself to `step`, where it is refused

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        row_rate: float = 5.0,
        row_max_norm: float | None = None,
        row_rule: str = "adam",
        router_bias_rate: float = 0.001,
        muon: Muon | None = None,
        muon_rate: float = 1.0,
        mup: MuP | None = None,
    ) -> None:
        self.memories = [module for module in model.modules() if isinstance(module, Memory)]
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.router_bias_rate = router_bias_rate
        self.rule = _row_rule(row_rule, betas, eps, row_max_norm)
        self.muon = muon
        self.guards = Guards(next((module for module in model.modules() if isinstance(module, MemoryStack)), None))
        self.rows_touched = 0
        self.max_violation = 0.0
        anchors = {id(memory.anchor) for memory in self.memories}
        # Embeddings, and what an Engram holds beside its projections: gains and convolution, [n, d] and [n, d, kernel].
        spared = [m for m in model.modules() if isinstance(m, nn.Embedding | Engram)]
        kept = {id(p) for module in spared for p in module.parameters(recurse=False)}
        dense = [p for p in model.parameters() if p.requires_grad and id(p) not in anchors]
        decayed = [p for p in dense if p.dim() > 1 and id(p) not in kept]
        plain = [p for p in dense if p.dim() <= 1 or id(p) in kept]
        blocks = _hidden_matrices(model) if muon else {}
        decayed, hidden = [p for p in decayed if id(p) not in blocks], [p for p in decayed if id(p) in blocks]
        groups: list[dict[str, Any]] = [
            {"kind": "adamw", "params": decayed, "lr": lr, "weight_decay": weight_decay},
            {"kind": "adamw", "params": plain, "lr": lr, "weight_decay": 0.0},
        ]
        for count in sorted({blocks[id(p)] for p in hidden}):
            matrices = [p for p in hidden if blocks[id(p)] == count]
            group = {"kind": "muon", "params": matrices, "lr": muon_rate * lr, "weight_decay": weight_decay}
            groups.append({**group, "blocks": count})
        anchored = [m.anchor for m in self.memories]
        groups.append({"kind": "rows", "params": anchored, "lr": row_rate * lr, "weight_decay": 0.0})
        groups = [group for group in groups if group["params"]]
        if mup is not None:
            groups = mup.split(groups, model, eps)
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError("row gradients leave the graph unscaled by a GradScaler: train in float32 or bfloat16")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        row_gradients = self._take_row_gradients()  # raises before anything has moved
        for group in self.param_groups:
            if group["kind"] == "adamw":
                self._step_adamw(group)
            elif group["kind"] == "muon":
                self._step_muon(group)
        self._step_rows(row_gradients)
        self.guards.look({memory: rows for memory, rows, _, _ in row_gradients})
        if self.routers:
            # A frozen router stays as it is, bias and all: an adapter is saved without it.
            rates = [self.router_bias_rate if router.weight.requires_grad else 0.0 for router in self.routers]
            moved = [router.update_bias(rate) for router, rate in zip(self.routers, rates, strict=True)]
            self.max_violation = float(torch.stack(moved).mean())
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for memory in self.memories:
            memory.lookup.pending.drop()

    def state_dict(self) -> dict[str, Any]:
        """As torch's; for each anchor (digest, generation, step), while the state of the rows stays with the rows."""
        for memory in self.memories:
            # The backbone's generation: the stock Trainer prepares the optimizer before its tables are back.
            present = {"digest": memory.table.digest, "generation": int(memory.generation)}
            self.state[memory.anchor] |= present
            self.state[memory.anchor].setdefault("step", 0)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the model first. ValueError where this state belongs to other tables, or to another moment of them."""
        saved_kinds, kinds = (
            [(group["kind"], group.get("blocks"), group.get("mup")) for group in groups]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        if saved_kinds != kinds:
            raise ValueError(
                f"the optimizer state was saved with groups (kind, blocks, mup) {saved_kinds}, this one has {kinds}: "
                "make the optimizer with the same `muon` and `mup`, and the same parameters frozen"
            )
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        index = {id(parameter): i for i, parameter in enumerate(order)}
        own = {index[id(memory.anchor)]: memory for memory in self.memories}
        rows = {i: dict(state_dict["state"][i]) for i in own if i in state_dict["state"]}
        for i, saved in rows.items():
            for field, present in (("digest", own[i].table.digest), ("generation", int(own[i].generation))):
                if saved[field] != present:
                    raise ValueError(
                        f"the optimizer state was saved with table {field} {saved[field]}, the model has {present}: "
                        "load the model of the same checkpoint first"
                    )
        dense = {i: state for i, state in state_dict["state"].items() if i not in own}
        super().load_state_dict({**state_dict, "state": dense})
        for i, saved in rows.items():
            self.state[own[i].anchor] = saved

    def _step_adamw(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=parameters[0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_muon(self, group: dict[str, Any]) -> None:
        assert self.muon is not None
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            before = state["momentum"] if state else torch.zeros_like(parameter)
            direction, state["momentum"] = self.muon.direction(parameter.grad, before, group["blocks"])
            length = group["lr"] * self.muon.length(parameter.shape, group["blocks"])
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-length)

    def _take_row_gradients(self) -> list[tuple[Memory, Tensor, Tensor, int]]:
        """Of each memory that moves: row ids and gradients that this rank applies, and how many rows move in all.

        RuntimeError, on all ranks, if a gradient is not finite.
        """
        taken = []
        for memory in self.memories:
            pending = memory.lookup.pending
            if not memory.anchor.requires_grad:
                continue
            if memory.anchor.grad is None:
                pending.drop()  # the gradients were zeroed through a wrapper, which knows only the anchor
            if isinstance(memory.table, ShardedTable) and isinstance(self.rule, SinkhornMomentum):
                raise ValueError(
                    "row_rule='sinkhorn' balances rows with one another, of which a rank has its own only: "
                    "train sharded tables with 'adam' or 'adagrad'"
                )
            rows, gradient = pending.take() or _nothing(memory.anchor, memory.table.width)
            taken.append((memory, *exchange(memory.table, rows, gradient)))
        # After the exchange of all of them: a rank that raised alone would leave the others waiting for it.
        moved = []
        for memory, rows, gradient in taken:
            total, bad = totals(memory.table, len(rows), _not_finite(gradient))
            table = memory.table.base if isinstance(memory.table, CachedTable) else memory.table
            if total and isinstance(table, FileTable):
                table.refuse()
            if bad:
                raise RuntimeError(
                    f"{bad} of {total} row gradients are not finite; nothing was changed. "
                    "Lower the learning rate, or zero the gradients and skip this batch"
                )
            if total:
                moved.append((memory, rows, gradient, total))
        return moved

    def _step_rows(self, row_gradients: list[tuple[Memory, Tensor, Tensor, int]]) -> None:
        rates = {id(p): g["lr"] for g in self.param_groups if g["kind"] == "rows" for p in g["params"]}
        self.rows_touched = 0
        for memory, rows, gradient, total in row_gradients:
            table, changed = memory.table, rows
            if isinstance(table, ShardedTable):  # the rows are all this rank's own
                rows, table = table.ranks.local(rows), table.part
            if len(rows):
                update_rows(table, self.rule, rows, gradient, rates[id(memory.anchor)])
            memory.commit(change_of(memory.table, changed, total))
            self.rows_touched += total
            self.state[memory.anchor]["step"] = self.state[memory.anchor].get("step", 0) + 1


def _row_rule(name: str, betas: tuple[float, float], eps: float, max_norm: float | None) -> RowRule:
    if name == "adam":
        return LazyAdam(betas=betas, eps=eps, max_norm=max_norm)
    if name == "adagrad":
        return RowAdagrad(eps=eps, max_norm=max_norm)
    if name != "sinkhorn":
        raise ValueError(f"row_rule is {name!r}; it must be one of adam, adagrad, sinkhorn")
    if max_norm is not None:
        raise ValueError(
            "row_max_norm has no effect under row_rule='sinkhorn', whose steps all have one length: drop it"
        )
    return SinkhornMomentum()


def _hidden_matrices(model: nn.Module) -> dict[int, int]:
    """Of each weight that Muon may move, by its id: how many matrices lie in its rows."""
    blocks = {id(p): 1 for p in model.parameters() if p.dim() == 2}
    for module in model.modules():
        if isinstance(module, Experts):
            blocks |= {id(module.gate_up): 2, id(module.down): 1}
        elif isinstance(module, Engram):
            blocks[id(module.key.weight)] = module.num_streams
        find_head = getattr(module, "get_output_embeddings", None)
        head = find_head() if find_head else None
        blocks.pop(id(getattr(head, "weight", None)), None)
    return blocks


def _not_finite(gradient: Tensor) -> int:
    """How many rows hold a number that is not finite."""
    if not len(gradient) or torch.stack(torch.aminmax(gradient)).isfinite().all():  # both are NaN if anything is
        return 0
    return int((~gradient.isfinite()).any(dim=1).sum())


def _nothing(anchor: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return anchor.new_empty(0, dtype=torch.int64), anchor.new_empty(0, width, dtype=torch.float32)
