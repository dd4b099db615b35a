"""What stands between encoder and decoder: boundaries, concepts, the deep transformer over them, and the way back.

    h [B, T, d_t] -> p, b (byrote.nn.boundary) -> the mean of each segment -> W_up -> concepts [B, M, d_c]
      -> blocks, causal over the concepts of a document, at positions 0, 1, 2, ... -> norm -> smoothing
      -> attention from tokens to concepts (byrote.nn.concept_attention) -> what is added to h

DLCM (2512.24617) sections 3.3 to 3.5. One code for whole texts and for single tokens: the transformer runs over the
concepts that the tokens at hand form, for the rows that form any, and not at all where none does. With a decode state
it goes on behind the concepts kept there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from byrote.memory import Sequence
from byrote.memory.concepts import NOWHERE, ConceptState
from byrote.models.block import BlockOutput, exit_of, record
from byrote.models.dlcm.block import ConceptBlock
from byrote.models.dlcm.configuration import DLCMConfig
from byrote.nn.boundary import BoundaryHead, sample
from byrote.nn.concept import Formed, pool, smooth
from byrote.nn.concept_attention import ConceptAttention, Places
from byrote.nn.mla import Cache
from byrote.nn.rope import rotary


class ConceptOutput(NamedTuple):
    """addend [B, T, d_t]; probabilities and boundaries [B, T]; balance_loss [B] of the experts, if there are any."""

    addend: Tensor
    probabilities: Tensor
    boundaries: Tensor
    balance_loss: Tensor | None


class ConceptStage(nn.Module):
    def __init__(self, config: DLCMConfig) -> None:
        super().__init__()
        self.config = config
        d, size, eps = config.hidden_size, config.concept_size, config.rms_norm_eps
        self.boundary = BoundaryHead(d, 0 if config.boundary_mode == "rule" else config.boundary_size or d)
        self.up = nn.Linear(d, size, bias=False)
        # What a document's first tokens read, where their own segment is not done yet.
        self.beginning = nn.Parameter(torch.empty(size)) if config.boundary_convention == "open" else None
        self.layers = nn.ModuleList([ConceptBlock(config, i) for i in range(config.num_concept_layers)])
        self.exit = exit_of(config, size)
        self.norm = nn.RMSNorm(size, eps=eps)
        self.read = ConceptAttention(
            d,
            size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            weighting=config.concept_weighting,  # type: ignore[arg-type]
            kernel=config.concept_kernel,  # type: ignore[arg-type]
            eps=eps,
        )

    def forward(
        self, h: Tensor, sequence: Sequence, state: ConceptState | None = None, forced: Tensor | None = None
    ) -> ConceptOutput:
        """`forced` bool [B, T]: boundaries to take instead of the model's own."""
        p, boundaries, query = self.choose(h, sequence, state, forced)
        formed = Formed.of(boundaries)
        raw = pool(
            h,
            formed,
            boundaries,
            sequence.alive,
            sequence.starts,
            self.config.boundary_convention,  # type: ignore[arg-type]
            None if state is None else (state.open_total, state.open_count),
        )
        concepts = self.up(raw)
        if self.beginning is not None:
            concepts = torch.where(formed.at(sequence.starts)[:, None], self.beginning.to(concepts.dtype), concepts)
        moved = p if self.config.boundary_mode == "e2e" else p.detach()
        keys, balance = self._think(concepts, formed, moved, sequence, state)
        if state is not None:
            state.advance("query", query, sequence)
            state.close(h, boundaries, sequence, opens=self.config.boundary_convention == "open")
        if keys is None:  # padding alone, so far
            return ConceptOutput(torch.zeros_like(h), p, boundaries, balance)
        addend = self.read(h, *keys)
        if self.config.boundary_mode == "e2e":
            chosen = torch.where(boundaries, p, 1 - p)
            addend = addend * (1 + chosen - chosen.detach()).to(addend.dtype)[..., None]
        return ConceptOutput(addend, p, boundaries, balance)

    def choose(
        self, h: Tensor, sequence: Sequence, state: ConceptState | None = None, forced: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities and boundaries [B, T], and what the next token's probability needs of each, [B, T, s]."""
        tail = None if state is None else state.tails["query"]
        p, query = self.boundary(h, sequence.starts, sequence.alive, tail)
        if forced is not None:
            boundaries = (forced | sequence.starts) & sequence.alive
        elif self.training and self.config.boundary_mode != "rule":
            boundaries = sample(p, self.config.boundary_temperature)
        else:
            boundaries = sequence.starts | (p >= self.config.boundary_threshold)
        return p, boundaries, query

    def _think(
        self, concepts: Tensor, formed: Formed, p: Tensor, sequence: Sequence, state: ConceptState | None
    ) -> tuple[tuple[Tensor, Tensor, Places] | None, Tensor | None]:
        """Run new concepts [N, d_c] through the transformer. (keys, values and places of all that tokens may read,
        None if there is nothing; balance loss)
        """
        document, position = formed.at(sequence.document), formed.at(sequence.position_ids)
        some, rows, key, value, balance = formed, None, None, None, None
        most = int(formed.counts.max()) if state is None else int((state.lengths + formed.counts).max())
        if state is not None:  # only the rows that form a concept
            rows = formed.counts.nonzero().squeeze(1)
            some = formed.among(rows)
        if len(formed.row):
            slots = formed.rank if state is None else state.lengths[formed.row] + formed.rank
            if state is not None:
                state.write("document", formed.row, slots, document, most)
                state.write("position", formed.row, slots, position, most)
            z, balance = self._transform(some.pad(concepts), some, some.pad(document, NOWHERE), rows, slots, state)
            if self.config.concept_smoothing == "ema":
                last = None if state is None or state.last is None or rows is None else state.last[rows]
                z = smooth(z, some.pad(formed.at(p)), some.pad(formed.at(sequence.starts)), last)
                if state is not None:
                    ends = formed.rank == formed.counts[formed.row] - 1
                    state.keep_last(formed.row, slots, z[some.row, some.rank], ends, most)
            key, value = self.read.keys(z)
            if state is not None:
                keep = _keep(state, "read", some, formed.row, None, slots, most)
                key, value = keep(key, value)
        elif state is not None and most:
            key, value = state.read("read_key"), state.read("read_value")
        if key is None or value is None:
            return None, balance
        if state is None:
            kept = some.pad(document, NOWHERE), some.pad(position)
        else:
            kept = state.read("document", None, most), state.read("position", None, most)
        return (key, value, Places(sequence.document, sequence.position_ids, *kept)), balance

    def _transform(
        self,
        concepts: Tensor,
        some: Formed,
        document: Tensor,
        rows: Tensor | None,
        slots: Tensor,
        state: ConceptState | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The blocks over padded concepts [R, M, d_c] of some rows. (z [R, M, d_c]; balance loss of all rows [B])"""
        order = torch.arange(concepts.shape[1], device=concepts.device)
        alive = order < some.counts[:, None]
        if state is None or rows is None:
            at, keys = order.expand_as(document), document
        else:
            at = state.lengths[rows][:, None] + order
            keys = state.read("document", rows, int(slots.max()) + 1)
        earlier = torch.arange(keys.shape[1], device=keys.device) <= at[..., None]
        sees = earlier & (keys[:, None, :] == document[..., None])
        sequence = Sequence((sees.sum(dim=-1) - 1).clamp_min(0), alive, torch.zeros_like(alive), document)
        mask = (sees | ~alive[..., None]).unsqueeze(1)  # padding sees anything, to stay finite
        dim = self.config.head_dim if self.config.kv_lora_rank is None else self.config.qk_rope_head_dim
        angles = rotary(sequence.position_ids, dim, theta=self.config.rope_theta)
        streams = concepts.unsqueeze(2).expand(-1, -1, self.config.num_streams, -1)
        balance: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            cache = None
            if state is not None and rows is not None:
                cache = _keep(state, str(i), some, rows[some.row], rows, slots, keys.shape[1])
            output = BlockOutput(*layer(streams, angles, mask, sequence, None, None, cache))
            streams = output.streams
            record(layer, output, balance)
        return self.norm(self.exit(streams)), torch.stack(balance).mean(dim=0) if balance else None


def _keep(
    state: ConceptState, name: str, some: Formed, row: Tensor, rows: Tensor | None, slots: Tensor, most: int
) -> Cache:
    """A cache that keeps padded keys and values [R, H, M, n] of new concepts, which go to `slots` of `row`, and hands
    out the first `most` slots of `rows`.
    """

    def update(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        for part, values in ((f"{name}_key", key), (f"{name}_value", value)):
            state.write(part, row, slots, values[some.row, :, some.rank], most)
        return state.read(f"{name}_key", rows, most), state.read(f"{name}_value", rows, most)

    return update
