"""One block: memory, attention, experts, each read from and added to the residual streams.

streams <- streams + Engram(streams, rows)          blocks with a memory; Engram paper section 2.4, equation 6
streams <- write(MLA(norm(x))),  x, write = connect(streams)
streams <- write(MoE(norm(x))),  likewise           (a dense SwiGLU in the first blocks)

With memory_fusion "single" a memory is a sublayer like the others, streams <- write(Engram(x, rows)): the paper's
ablation without multiple branches, which fuses one Engram into the hidden state behind the pre-mapping.

Blocks behind the last one, from layer id num_hidden_layers on, belong to the modules of multi-token prediction
(byrote.nn.mtp): without a memory, and with experts if the last block of the trunk has them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from byrote.memory import Sequence, Ticket
from byrote.models.engram.configuration import EngramConfig
from byrote.nn.engram import Engram, UngatedMemory
from byrote.nn.hyper import Convention, HyperConnection, ManifoldConnection, Residual
from byrote.nn.mla import MLA, Cache
from byrote.nn.moe import MLP, DeepSeekMoE
from byrote.nn.rope import yarn_softmax_scale


class BlockOutput(NamedTuple):
    """streams [B, T, n, d]; counts [E] and balance_loss [B] of the experts; columns [B, T, n * d] of the convolution.

    A flat tuple, because re-entrant checkpointing carries gradients through nothing else; the last three may be None.
    """

    streams: Tensor
    counts: Tensor | None
    balance_loss: Tensor | None
    columns: Tensor | None


class EngramBlock(GradientCheckpointingLayer):
    def __init__(self, config: EngramConfig, layer_id: int) -> None:
        super().__init__()
        d = config.hidden_size
        self.layer_id = layer_id
        has_memory = layer_id in config.memory_layers
        single = has_memory and config.memory_fusion == "single"
        self.memory_connection = _connection(config, 2 * layer_id) if single else None
        self.memory: Engram | UngatedMemory | None = None
        if has_memory and config.memory_gate:
            self.memory = Engram(
                d,
                config.memory_size,
                num_streams=1 if single else config.num_streams,
                kernel_size=config.memory_kernel_size,
                dilation=len(config.memory_table_sizes) + 1,
                bias=config.memory_bias,
                zero_gate_rule=config.memory_zero_gate_rule,  # type: ignore[arg-type]
            )
        elif has_memory:
            self.memory = UngatedMemory(d, config.memory_size)
        self.attention_connection = _connection(config, 2 * layer_id)
        self.attention_norm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        self.attention = MLA(
            d,
            config.num_attention_heads,
            config.q_lora_rank,
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            eps=config.rms_norm_eps,
            softmax_scale=yarn_softmax_scale(config.qk_nope_head_dim + config.qk_rope_head_dim, config.yarn_parameters),
        )
        self.experts_connection = _connection(config, 2 * layer_id + 1)
        self.experts_norm = nn.RMSNorm(d, eps=config.rms_norm_eps)
        self.experts: MLP | DeepSeekMoE
        if min(layer_id, config.num_hidden_layers - 1) < config.first_k_dense_replace:
            self.experts = MLP(d, config.intermediate_size)
        else:
            self.experts = DeepSeekMoE(
                d,
                config.moe_intermediate_size,
                config.n_routed_experts,
                config.num_experts_per_tok,
                config.shared_expert_intermediate_size,
                scores=config.scoring_func,  # type: ignore[arg-type]
                renormalize=config.norm_topk_prob,
                route_scale=config.routed_scaling_factor,
                n_group=config.n_group,
                topk_group=config.topk_group,
            )

    def forward(
        self,
        streams: Tensor,
        rotary: Tensor,
        mask: Tensor | None,
        sequence: Sequence,
        ticket: Ticket | None = None,
        tail: Tensor | None = None,
        cache: Cache | None = None,
    ) -> BlockOutput:
        """streams [B, T, n, d]; `ticket` of its memory, `tail` of its convolution, `cache` of its attention."""
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
        streams = write(self.attention(self.attention_norm(x), rotary, mask, cache))
        x, write = self.experts_connection(streams)
        if isinstance(self.experts, MLP):
            return BlockOutput(write(self.experts(self.experts_norm(x))), None, None, columns)
        y, stats = self.experts(self.experts_norm(x), sequence.alive)
        return BlockOutput(write(y), stats.counts, stats.balance_loss, columns)


def _connection(config: EngramConfig, sublayer: int) -> Residual | HyperConnection | ManifoldConnection:
    n, d, eps = config.num_streams, config.hidden_size, config.rms_norm_eps
    if n == 1:
        return Residual()
    if config.stream_connection == "hc":
        return HyperConnection(d, n, sublayer, norm_eps=eps)
    convention: Convention = "deepseek_v4" if config.stream_connection == "mhc" else "paper"
    return ManifoldConnection(d, n, sublayer, convention=convention, norm_eps=eps)
