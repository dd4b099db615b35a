"""One block: memory, attention, experts, each read from and added to the residual streams.

streams <- streams + Engram(streams, rows)          blocks with a memory; Engram paper section 2.4, equation 6
streams <- write(attention(norm(x))),  x, write = connect(streams)
streams <- write(experts(norm(x))),    likewise     (DeepSeekMoE, or a dense SwiGLU)

With a connection of its own a memory is a sublayer like the others, streams <- write(Engram(x, rows)): the paper's
ablation without multiple branches, which fuses one Engram into the hidden state behind the pre-mapping.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from byrote.memory import Sequence, Ticket
from byrote.nn.eager import Shares
from byrote.nn.engram import Engram, UngatedMemory
from byrote.nn.hyper import Convention, GatedExit, HyperConnection, ManifoldConnection, MeanExit, Residual
from byrote.nn.mla import Cache
from byrote.nn.moe import MLP, DeepSeekMoE
from byrote.nn.norm import RMSNorm
from byrote.nn.router import Router

Connection = Residual | HyperConnection | ManifoldConnection


class StreamConfig(Protocol):
    """What a config says of the residual streams."""

    num_streams: int
    stream_connection: str
    rms_norm_eps: float


class BlockOutput(NamedTuple):
    """streams [B, T, n, d]; counts [E] and balance_loss [B] of the experts; columns [B, T, n * d] of the convolution.

    A flat tuple, because re-entrant checkpointing carries gradients through nothing else; the last three may be None.
    """

    streams: Tensor
    counts: Tensor | None
    balance_loss: Tensor | None
    columns: Tensor | None


class Block(GradientCheckpointingLayer):
    """`sublayer`: how many attentions and experts stand before those of this block; `attention`: as byrote.nn.mla."""

    def __init__(
        self,
        config: StreamConfig,
        hidden_size: int,
        sublayer: int,
        attention: nn.Module,
        experts: MLP | DeepSeekMoE,
        memory: Engram | UngatedMemory | None = None,
        single_fusion: bool = False,
    ) -> None:
        super().__init__()
        self.memory_connection = connection(config, hidden_size, sublayer) if single_fusion else None
        self.memory = memory
        self.attention_connection = connection(config, hidden_size, sublayer)
        self.attention_norm = RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.attention = attention
        self.experts_connection = connection(config, hidden_size, sublayer + 1)
        self.experts_norm = RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.experts, self.routed = experts, isinstance(experts, DeepSeekMoE)

    def forward(
        self,
        streams: Tensor,
        rotary: Tensor,
        mask: Tensor | None,
        sequence: Sequence,
        ticket: Ticket | None = None,
        tail: Tensor | None = None,
        cache: Cache | None = None,
        shares: Shares | None = None,
    ) -> BlockOutput:
        """streams [B, T, n, d]; `ticket` of its memory, `tail` of its convolution, `cache` of its attention, which puts
        its weights into `shares`.
        """
        columns = None
        if self.memory is not None:
            assert ticket is not None
            rows = ticket.wait().to(streams.dtype)
            places = sequence.alive, sequence.starts, tail
            if self.memory_connection is None:
                addend, columns = self.memory(streams, rows, *places)
                streams = streams + addend
            else:
                x, write = self.memory_connection(streams)
                addend, columns = self.memory(x.unsqueeze(2), rows, *places)
                streams = write(addend.squeeze(2))
        x, write = self.attention_connection(streams)
        streams = write(self.attention(self.attention_norm(x), rotary, mask, cache, shares))
        x, write = self.experts_connection(streams)
        if not self.routed:
            return BlockOutput(write(self.experts(self.experts_norm(x))), None, None, columns)
        y, stats = self.experts(self.experts_norm(x), sequence.alive)
        return BlockOutput(write(y), stats.counts, stats.balance_loss, columns)


def connection(config: StreamConfig, hidden_size: int, sublayer: int) -> Connection:
    n, eps = config.num_streams, config.rms_norm_eps
    if n == 1:
        return Residual()
    if config.stream_connection == "hc":
        return HyperConnection(hidden_size, n, sublayer, norm_eps=eps)
    convention: Convention = "deepseek_v4" if config.stream_connection == "mhc" else "paper"
    return ManifoldConnection(hidden_size, n, sublayer, convention=convention, norm_eps=eps)


def exit_of(config: StreamConfig, hidden_size: int) -> GatedExit | MeanExit:
    """How the last streams become one again."""
    if config.num_streams > 1 and config.stream_connection == "mhc":
        return GatedExit(hidden_size, config.num_streams, norm_eps=config.rms_norm_eps)
    return MeanExit()


def record(block: Any, output: BlockOutput, balance: list[Tensor]) -> None:
    """Hand the load of the experts to their router, outside of a block that may run twice; collect balance losses."""
    if output.counts is not None:
        routers = [module for module in block.experts.modules() if isinstance(module, Router)]
        # An adapter that trains a whole router keeps the frozen one beside it.
        next((router for router in routers if router.weight.requires_grad), routers[0]).record(output.counts)
    if output.balance_loss is not None:
        balance.append(output.balance_loss)
