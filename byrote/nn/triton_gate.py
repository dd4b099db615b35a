"""Gather and gate in one kernel on the GPU, for inference. Needs Triton.

    gather_gate(records [R, W], ids [N, C], streams [N, n, d], key [n d, C W], gain [n, d])
        -> embeddings [N, C W] and gates [N, n], both float32

Of each token the C rows are read once, straight from pinned host memory (`byrote.tables.loops.triton`), written to
the device for the value projection, and, while they are still on the chip, projected to the keys, whose products with
the streams become the gates of `byrote.nn.engram`:

    k = W_K^(m) e       s = <gain * RMS(k), RMS(h)> / sqrt(d)       gain = g_k g_q
    gate = sigmoid(sign(s) sqrt(max(|s|, 1e-6)))

so the keys [N, n, d] never exist in memory. Sums and products are float32. Left out: biases of the key projection, a
backward, and memories whose C W values do not fit a program (`WIDEST`).

Records are float32 or bfloat16 here. It has run in Triton's interpreter, on a CPU, and was compiled for an H100; it
has run on no GPU, and `Engram` does not use it.
"""

# No `from __future__ import annotations` here: Triton reads the annotations.
import torch
import triton
import triton.language as tl
from torch import Tensor

from byrote.nn.engram import ZeroGateRule
from byrote.tables.loops.triton import check_records

TOKENS, COLUMNS = 16, 16  # of a program, and of the keys at a time: the least that a product takes
WIDEST = 1024  # values of a token's memory; compiled for an H100, a program then takes 128 KB of shared memory


@triton.jit
def _gather_gate(
    records, ids, streams, key, gain, embeddings, gates, count, columns, width, hidden, eps,
    STREAMS: tl.constexpr, MEMORY: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, COPYSIGN: tl.constexpr,
):  # fmt: skip
    token, place = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, MEMORY)
    inside, used = token < count, place < columns * width
    mask = inside[:, None] & used[None, :]
    row = tl.load(ids + token[:, None] * columns + (place // width)[None, :], mask=mask, other=0)
    memory = tl.load(records + row * width + (place % width)[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(embeddings + token[:, None] * (columns * width) + place[None, :], memory, mask=mask)
    for stream in range(STREAMS):
        product = tl.zeros([TOKENS], tl.float32)
        keys, queries = product, product
        for begin in range(0, hidden, COLUMNS):
            at = begin + tl.arange(0, COLUMNS)
            here = at < hidden
            weight = tl.load(
                key + (stream * hidden + at)[None, :] * (columns * width) + place[:, None],
                mask=used[:, None] & here[None, :],
                other=0.0,
            )
            k = tl.dot(memory, weight.to(tl.float32), input_precision="ieee")
            h = tl.load(
                streams + (token[:, None] * STREAMS + stream) * hidden + at[None, :],
                mask=inside[:, None] & here[None, :],
                other=0.0,
            ).to(tl.float32)
            g = tl.load(gain + stream * hidden + at, mask=here, other=0.0).to(tl.float32)
            product += tl.sum(k * h * g[None, :], 1)
            keys += tl.sum(k * k, 1)
            queries += tl.sum(h * h, 1)
        scale = tl.sqrt((keys / hidden + eps) * (queries / hidden + eps) * hidden)
        logit = product / scale
        root = tl.sqrt(tl.maximum(tl.abs(logit), 1e-6))
        signed = tl.where(logit < 0, -root, root)
        if not COPYSIGN:
            signed = tl.where(logit == 0, 0.0, signed)
        tl.store(gates + token * STREAMS + stream, 1 / (1 + tl.exp(-signed)), mask=inside)


def gather_gate(
    records: Tensor, ids: Tensor, streams: Tensor, key: Tensor, gain: Tensor, eps: float, zero_gate_rule: ZeroGateRule
) -> tuple[Tensor, Tensor]:
    if records.dtype not in (torch.float32, torch.bfloat16) or not records.is_contiguous():
        raise ValueError(f"records must be float32 or bfloat16 and contiguous, got {records.dtype}: gather, then gate")
    check_records(records.view(torch.uint8), ids, records.shape[1] * records.itemsize)
    (count, columns), width, (_, number, hidden) = ids.shape, records.shape[1], streams.shape
    memory = columns * width
    wanted = {"streams": (count, number, hidden), "key": (number * hidden, memory), "gain": (number, hidden)}
    for (name, shape), array in zip(wanted.items(), (streams, key, gain), strict=True):
        if tuple(array.shape) != shape or not array.is_contiguous() or array.device != ids.device:
            raise ValueError(
                f"{name} must be {list(shape)}, contiguous and on {ids.device}, got {list(array.shape)}, strides "
                f"{array.stride()}, on {array.device}"
            )
    if memory > WIDEST:
        raise ValueError(f"a token's memory of {memory} values does not fit a program of {WIDEST}: gather, then gate")
    embeddings = torch.empty(count, memory, device=ids.device)
    gates = torch.empty(count, number, device=ids.device)
    if count:
        _gather_gate[(triton.cdiv(count, TOKENS),)](
            *(records, ids, streams, key, gain, embeddings, gates, count, columns, width, hidden, eps),
            STREAMS=number,
            MEMORY=max(triton.next_power_of_2(memory), 16),
            TOKENS=TOKENS,
            COLUMNS=COLUMNS,
            COPYSIGN=zero_gate_rule == "copysign",
        )
    return embeddings, gates


def gather_gate_twin(
    records: Tensor, ids: Tensor, streams: Tensor, key: Tensor, gain: Tensor, eps: float, zero_gate_rule: ZeroGateRule
) -> tuple[Tensor, Tensor]:
    from byrote.nn.engram import Gate

    embeddings = records.index_select(0, ids.flatten().to(records.device)).float().to(ids.device).view(len(ids), -1)
    keys = (embeddings @ key.float().T).view(streams.shape)
    gate = Gate(zero_gate_rule, eps)
    return embeddings, gate(streams[None], keys[None], gain.float(), torch.ones_like(gain, dtype=torch.float32))[0]
