"""How the weights of all models start.

    linear, embedding, router, experts   N(0, std^2)
    biases, convolution                  0              (Engram paper, table 5: conv zero init)
    all gains                            1
    connections, exits                   the plain residual (byrote.nn.hyper)
    generation and identity              the table's
    other buffers                        as they are made: a model may have been made on the meta device

Rows of tables are drawn by the table itself. By transformers' functions, which spare what a checkpoint has loaded.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

from byrote.memory import Memory, MemoryStack
from byrote.nn.engram import Engram
from byrote.nn.hyper import GatedExit, HyperConnection, ManifoldConnection
from byrote.nn.moe import Experts
from byrote.nn.router import Router


@torch.no_grad()
def initialize(module: nn.Module, std: float) -> None:
    """`module` alone, without the modules in it."""
    if isinstance(module, (nn.Linear, nn.Embedding, Router)):
        init.normal_(module.weight, mean=0.0, std=std)
        if getattr(module, "bias", None) is not None:
            init.zeros_(module.bias)  # type: ignore[arg-type]
    elif isinstance(module, Experts):
        init.normal_(module.gate_up, mean=0.0, std=std)
        init.normal_(module.down, mean=0.0, std=std)
    elif isinstance(module, nn.RMSNorm):
        init.ones_(module.weight)
    elif isinstance(module, Engram):
        module.reset_gains(init)
    elif isinstance(module, HyperConnection | ManifoldConnection | GatedExit):
        module.reset(init.copy_)
    elif isinstance(module, Memory):
        init.zeros_(module.anchor)
        init.constant_(module.generation, module.table.generation)
        init.constant_(module.identity, module.table.identity)
    elif isinstance(module, MemoryStack):
        init.copy_(module.vocabulary, module.known_vocabulary())
    if isinstance(module, Router):
        init.zeros_(module.selection_bias)
