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

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from byrote.memory import Memory, MemoryStack
from byrote.memory.row_step import Move, take_moves
from byrote.nn.engram import Engram
from byrote.nn.moe import Experts
from byrote.nn.router import Router
from byrote.tables.rules import row_rule as rule_named
from byrote.train.guards import Guards
from byrote.train.muon import Muon
from byrote.train.mup import MuP

RATE_OF_BIAS = "router_bias_update_rate"


class Optimizer(torch.optim.Optimizer):
    """For any model that holds `byrote.memory.Memory` modules; also for one that holds none.

    `row_rate`: the tables' rate as a multiple of `lr` (Engram paper, table 5: 5). `row_max_norm`: bound on the norm of
    one row's gradient. `row_rule`: adam, adagrad or sinkhorn (`byrote.tables.rules`). `router_bias_rate`: step of the
    loss-free balance; by default the config's `router_bias_update_rate` (DeepSeek-V3 section 4.2: 0.001). `muon`: the
    rule of the hidden matrices, AdamW's where there is none; `muon_rate`: their rate as a multiple of `lr`. `mup`:
    rates and eps by width, of a model with `mup_groups`; by default those of a config with `mup_base_width`, None for
    none. ValueError where a number is negative or not finite.

    After a step, `rows_touched` counts the rows that it changed and `max_violation` is the mean MaxVio of the routers.
    """

    moves_rows = True  # in its own step: `byrote.memory.row_step` leaves it alone
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
        router_bias_rate: float | None = None,
        muon: Muon | None = None,
        muon_rate: float = 1.0,
        mup: MuP | Literal["config"] | None = "config",
    ) -> None:
        config = next((c for m in model.modules() if hasattr(c := getattr(m, "config", None), RATE_OF_BIAS)), None)
        if router_bias_rate is None:
            router_bias_rate = 0.001 if config is None else getattr(config, RATE_OF_BIAS)
        if mup == "config":  # a wrapper, as that of an adapter, has parameters without a place
            mup = MuP() if hasattr(type(model), "mup_groups") and getattr(config, "mup_base_width", None) else None
        _check_numbers(
            lr=lr, eps=eps, weight_decay=weight_decay, row_rate=row_rate, router_bias_rate=router_bias_rate,
            muon_rate=muon_rate,
        )  # fmt: skip
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas is {betas}; both must lie in [0, 1), as (0.9, 0.95)")
        self.memories = [module for module in model.modules() if isinstance(module, Memory)]
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.router_bias_rate = router_bias_rate
        self.rule = rule_named(row_rule, betas=betas, eps=eps, max_norm=row_max_norm)
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
        free = [memory for memory in self.memories if memory.anchor.requires_grad]
        moves = take_moves(dict.fromkeys(free, self.rule))  # raises before anything has moved
        for group in self.param_groups:
            if group["kind"] == "adamw":
                self._step_adamw(group)
            elif group["kind"] == "muon":
                self._step_muon(group)
        self._step_rows(moves)
        self.guards.look({move.memory: move.rows for move in moves})
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

    def _step_rows(self, moves: list[Move]) -> None:
        rates = {id(p): g["lr"] for g in self.param_groups if g["kind"] == "rows" for p in g["params"]}
        self.rows_touched = sum(move.total for move in moves)
        for move in moves:
            anchor = move.memory.anchor
            move.apply(rates[id(anchor)])
            self.state[anchor]["step"] = self.state[anchor].get("step", 0) + 1


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}; give a finite number, 0 or above")


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
