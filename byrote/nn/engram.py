"""The Engram layer: what a memory adds to the residual streams.

For position t, its concatenated rows e [d_mem], stream m of n with state h [d]; Engram paper (arXiv
2601.07372) sections 2.3 and 2.4, equations 3 to 6:

    v    = W_V e                                    one value, shared by all streams
    k    = W_K^(m) e                                one key per stream
    s    = <g_k * RMS(k), g_q * RMS(h)> / sqrt(d)   gains g_k, g_q per stream
    gate = sigmoid(sign(s) sqrt(max(|s|, 1e-6)))    the signed root is in all released code, in no equation
    u    = gate v
    addend = u + SiLU(DWConv(g_c * RMS(u)))         causal, depthwise, with `kernel_size` taps;
                                                    tap i weighs position t - (kernel_size - 1 - i) dilation

Shapes: streams [B, T, n, d], embeddings [B, T, d_mem], addend [B, T, n, d]. The caller adds the addend to the
streams.

At s = 0 the demo's sign(0) = 0 gives the gate 1/2 and DeepSeek's kernels' copysign gives sigmoid(+-0.001): an
option, as are the demo's biases. DeepSeek-V4.1 has neither biases nor the convolution (kernel_size = 0). The
convolution starts at zero (paper, table 5; the demo does not); the layer as a whole does not start as the
identity. Gate, norms and taps are computed in float32 whatever the dtype. Left out: fusing W_K and W_V into
one matrix.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ZeroGateRule = Literal["sign", "copysign"]


class Gate(nn.Module):
    """Gates [B, T, n] of streams and keys [B, T, n, d]. A module, so that a forward hook can record every
    gate.
    """

    def __init__(self, zero_gate_rule: ZeroGateRule, eps: float) -> None:
        super().__init__()
        if zero_gate_rule not in ("sign", "copysign"):
            raise ValueError(f"zero_gate_rule is {zero_gate_rule!r}; it must be 'sign' or 'copysign'")
        self.zero_gate_rule = zero_gate_rule
        self.eps = eps

    def forward(self, streams: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor) -> Tensor:
        logits = self.logits(streams, keys, query_gain, key_gain)
        root = logits.abs().clamp_min(1e-6).sqrt()
        signed = root * logits.sign() if self.zero_gate_rule == "sign" else torch.copysign(root, logits)
        return signed.sigmoid()

    def logits(self, streams: Tensor, keys: Tensor, query_gain: Tensor, key_gain: Tensor) -> Tensor:
        """s, by products and sums, which autocast leaves alone."""
        gain, width = _at_least_float32(query_gain) * _at_least_float32(key_gain), keys.shape[-1:]
        queries, keys = (F.rms_norm(_at_least_float32(x), width, None, self.eps) for x in (streams, keys))
        return (queries * (keys * gain)).sum(-1) / math.sqrt(width[0])


class Engram(nn.Module):
    """The layer: streams [B, T, n, d] and the rows of each token [B, T, d_mem] -> an addend a stream [B, T, n, d] (see
    above).
    """

    def __init__(
        self,
        hidden_size: int,
        memory_size: int,
        *,
        num_streams: int = 1,
        kernel_size: int = 4,
        dilation: int = 3,
        bias: bool = False,
        zero_gate_rule: ZeroGateRule = "sign",
        eps: float = torch.finfo(torch.float32).eps,
        conv_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if kernel_size < 0 or dilation < 1:
            raise ValueError(
                f"kernel_size is {kernel_size} and dilation {dilation}; "
                "give a dilation and a kernel of at least 1, or kernel_size 0 for no convolution"
            )
        self.num_streams, self.hidden_size = num_streams, hidden_size
        self.kernel_size, self.dilation, self.conv_eps = kernel_size, dilation, conv_eps
        self.key = nn.Linear(memory_size, num_streams * hidden_size, bias=bias)
        self.value = nn.Linear(memory_size, hidden_size, bias=bias)
        self.gate = Gate(zero_gate_rule, eps)
        self.key_gain = nn.Parameter(torch.empty(num_streams, hidden_size))
        self.query_gain = nn.Parameter(torch.empty(num_streams, hidden_size))
        if kernel_size:
            self.conv_gain = nn.Parameter(torch.empty(num_streams, hidden_size))
            self.conv_weight = nn.Parameter(torch.empty(num_streams, hidden_size, kernel_size))
        self.reset_gains()

    def reset_gains(self, init: Any = nn.init) -> None:
        """Gains 1, convolution 0. `init` may be transformers', which spares what a checkpoint has loaded."""
        init.ones_(self.key_gain)
        init.ones_(self.query_gain)
        if self.kernel_size:
            init.ones_(self.conv_gain)
            init.zeros_(self.conv_weight)

    @property
    def tail_length(self) -> int:
        """How many positions the convolution looks back."""
        return max(self.kernel_size - 1, 0) * self.dilation

    def forward(
        self,
        streams: Tensor,
        embeddings: Tensor,
        alive: Tensor | None = None,
        starts: Tensor | None = None,
        tail: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The addend, 0 where not alive; and the columns [B, T, n * d] that the convolution read, or None.

        `tail` [B, tail_length, n * d]: the columns of the positions before, newest last, 0 where none.
        """
        gates = self.gates(streams, embeddings)
        if alive is not None:
            gates = gates.masked_fill(~alive[..., None], 0.0)
        value = _at_least_float32(self.value(embeddings))
        if not self.kernel_size:
            return (gates[..., None] * value[:, :, None]).to(streams.dtype), None
        gain = _at_least_float32(self.conv_gain)
        # RMS(u) without a pass over u: all of a stream's u is one number times v.
        scale = gates * (gates.square() * value.square().mean(-1, keepdim=True) + self.conv_eps).rsqrt()
        value = value.unsqueeze(2)
        u, columns = gates[..., None] * value, (scale[..., None] * value * gain).to(streams.dtype)
        addend = u + self.convolve(columns, _documents(alive, starts), tail)
        return addend.to(streams.dtype), columns.flatten(2)

    def gates(self, streams: Tensor, embeddings: Tensor) -> Tensor:
        keys = self.key(embeddings).unflatten(-1, (self.num_streams, self.hidden_size))
        return self.gate(streams, keys, self.query_gain, self.key_gain)

    def convolve(self, columns: Tensor, documents: Tensor | None, tail: Tensor | None) -> Tensor:
        """SiLU(DWConv(columns)), [B, T, n, d]; `documents` [B, T] numbers the documents, None for one."""
        rows, tokens = columns.shape[:2]
        behind = 0 if tail is None else self.tail_length
        if documents is None:
            documents = torch.zeros(rows, tokens, dtype=torch.int64, device=columns.device)
        if tail is not None:
            columns = torch.cat([tail.to(columns.dtype).view(rows, behind, *columns.shape[2:]), columns], 1)
            documents = F.pad(documents, (behind, 0))  # the tail belongs to document 0, the one that goes on
        taps = _at_least_float32(self.conv_weight).permute(2, 0, 1)
        return F.silu(convolve(_at_least_float32(columns), taps, documents, self.dilation)[:, behind:])


def convolve(columns: Tensor, taps: Tensor, documents: Tensor, dilation: int) -> Tensor:
    """Of columns [B, T, n, d] by taps [K, n, d], within documents [B, T], of which equal numbers are one.

    One shifted multiply-add per tap: a convolution kernel could not stop where a document starts.
    """
    behind, tokens = (len(taps) - 1) * dilation, columns.shape[1]
    columns, before = F.pad(columns, (0, 0, 0, 0, behind, 0)), F.pad(documents, (behind, 0), value=-1)
    z = columns[:, behind:] * taps[-1]
    for tap in range(len(taps) - 1):
        place = slice(tap * dilation, tap * dilation + tokens)
        others = (before[:, place] != documents)[..., None, None]
        z = torch.addcmul(z, columns[:, place].masked_fill(others, 0.0), taps[tap])
    return z


class UngatedMemory(nn.Module):
    """The control without a gate: addend = W_V e on every stream. Called as `Engram` is; nothing to carry."""

    def __init__(self, hidden_size: int, memory_size: int) -> None:
        super().__init__()
        self.value = nn.Linear(memory_size, hidden_size, bias=False)

    def forward(
        self,
        streams: Tensor,
        embeddings: Tensor,
        alive: Tensor | None = None,
        starts: Tensor | None = None,
        tail: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        value = self.value(embeddings)
        if alive is not None:
            value = value * alive[..., None]
        return value[:, :, None].expand_as(streams).to(streams.dtype), None


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _documents(alive: Tensor | None, starts: Tensor | None) -> Tensor | None:
    """Number of each position's document [B, T]. A dead position opens one, so that nothing looks past it."""
    if starts is not None:
        return (starts if alive is None else starts | ~alive).cumsum(1)
    return None if alive is None else (~alive).cumsum(1)
