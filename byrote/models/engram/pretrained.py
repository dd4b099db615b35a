"""What both Engram classes share: initialization, and what must stay in float32."""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init

from byrote.models.engram.configuration import EngramConfig
from byrote.models.pretrained import MemoryPreTrainedModel
from byrote.nn.engram import Engram
from byrote.nn.hyper import GatedExit, HyperConnection, ManifoldConnection
from byrote.nn.moe import Experts
from byrote.nn.router import Router


class EngramPreTrainedModel(MemoryPreTrainedModel):
    config_class = EngramConfig
    config: EngramConfig
    _no_split_modules = ["EngramBlock"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "memory_connection",
        "attention_connection",
        "experts_connection",
        "exit",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The whole initialization; std = `initializer_range`.

        linear, embedding, router, experts   N(0, std^2)
        biases, convolution                  0              (Engram paper, table 5: conv zero init)
        all gains                            1
        connections, exit                    the plain residual (byrote.nn.hyper)
        rows of the tables                   N(0, memory_initializer_range^2), drawn by the table itself
        """
        std = self.config.initializer_range
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
        if isinstance(module, Router):
            init.zeros_(module.selection_bias)
