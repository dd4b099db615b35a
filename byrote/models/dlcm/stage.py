"""What stands between encoder and decoder: boundaries, concepts, the deep transformer over them, and the way back.

    h [B, T, d_t] -> p, b (byrote.nn.boundary) -> the mean of each segment -> W_up -> concepts [B, M, d_c]
      -> blocks, causal over the concepts of a document, at positions 0, 1, 2, ... -> norm -> smoothing
      -> attention from tokens to concepts (byrote.nn.concept_attention) -> what is added to h

DLCM (2512.24617) sections 3.3 to 3.5. One code for whole texts and for single tokens: the transformer runs over the
concepts that the tokens at hand form, for the rows that form any, and not at all where none does. With a decode state
it goes on behind the concepts kept there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from byrote.compiled.loops import stepping
from byrote.memory import Sequence
from byrote.memory.concept_state import NOWHERE, ConceptState
from byrote.models.block import BlockOutput, exit_of, record
from byrote.models.dlcm.block import ConceptBlock
from byrote.models.dlcm.configuration import DLCMConfig
from byrote.nn.boundary import BoundaryHead, sample
from byrote.nn.concept_attention import ConceptAttention, Places
from byrote.nn.norm import RMSNorm
from byrote.nn.pooling import Formed, pool, smooth
from byrote.nn.rope import rotary


class ConceptOutput(NamedTuple):
    """addend [B, T, d_t]; probabilities and boundaries [B, T]; balance_loss [B] of the experts, if there are any."""

    addend: Tensor
    probabilities: Tensor
    boundaries: Tensor
    balance_loss: Tensor | None


# How many concepts there are is data: the parts between the blocks run as they are, and each block is one graph.
glue = torch.compiler.disable(recursive=False)


class ConceptStage(nn.Module):
    """Encoder states [B, T, d] -> what the decoder reads of the concepts [B, T, d], with boundaries (see above)."""

    def __init__(self, config: DLCMConfig) -> None:
        super().__init__()
        self.config = config
        d, size, eps = config.hidden_size, config.concept_size, config.rms_norm_eps
        self.boundary = BoundaryHead(d, 0 if config.boundary_mode == "rule" else config.query_size)
        self.up = nn.Linear(d, size, bias=False)
        # What a document's first tokens read, where their own segment is not done yet.
        self.beginning = nn.Parameter(torch.empty(size)) if config.boundary_convention == "open" else None
        self.layers = nn.ModuleList([ConceptBlock(config, i) for i in range(config.num_concept_layers)])
        self.exit = exit_of(config, size)
        self.norm = RMSNorm(size, eps=eps)
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

    @glue
    def forward(
        self, h: Tensor, sequence: Sequence, state: ConceptState | None = None, forced: Tensor | None = None
    ) -> ConceptOutput:
        """`forced` bool [B, T]: boundaries to take instead of the model's own."""
        p, boundaries, query = self.choose(h, sequence, state, forced)
        balance = None
        if state is None or bool(boundaries.any()):
            moved = p if self.config.boundary_mode == "e2e" else p.detach()
            keys, balance = self._think(h, Formed.of(boundaries), boundaries, moved, sequence, state)
        else:  # most steps of decoding: there is nothing new to think about
            keys = _kept(state, sequence)
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

    @glue
    def _form(
        self, h: Tensor, formed: Formed, boundaries: Tensor, sequence: Sequence, state: ConceptState | None
    ) -> Tensor:
        """New concepts, [N, d_c], as the transformer gets them."""
        raw = pool(
            h,
            formed,
            boundaries,
            sequence.alive,
            sequence.starts,
            self.config.boundary_convention,  # type: ignore[arg-type]
            None if state is None else (state.open_total, state.open_count),
        )
        concepts = self.up(raw).to(raw.dtype)  # the residual stream of autocast is float32, of tokens and of concepts
        if self.beginning is None:
            return concepts
        return torch.where(formed.at(sequence.starts)[:, None], self.beginning.to(concepts.dtype), concepts)

    @glue
    def _think(
        self,
        h: Tensor,
        formed: Formed,
        boundaries: Tensor,
        p: Tensor,
        sequence: Sequence,
        state: ConceptState | None,
    ) -> tuple[tuple[Tensor, Tensor, Places] | None, Tensor | None]:
        """Run new concepts through the transformer. (keys, values and places of all that tokens may read, None if there
        is nothing; balance loss)
        """
        if not len(formed.row):  # padding alone
            return None, None
        concepts = self._form(h, formed, boundaries, sequence, state)
        document, position = formed.at(sequence.document), formed.at(sequence.position_ids)
        here = Here.of(formed, document, position, state)
        z, balance = self._transform(here.some.pad(concepts), here)
        if self.config.concept_smoothing == "ema":
            last = None if state is None or state.last is None else state.last[here.rows]
            z = smooth(z, here.some.pad(formed.at(p)), here.some.pad(formed.at(sequence.starts)), last)
            if state is not None:
                ends = formed.rank == formed.counts[formed.row] - 1
                state.keep_last(formed.row, here.slots, z[here.some.row, here.some.rank], ends, here.most)
        key, value = self.read.keys(z)
        if state is None:
            places = Places(sequence.document, sequence.position_ids, here.documents, here.some.pad(position))
            return (key, value, places), balance
        here.keep("read", key, value)
        return _kept(state, sequence, here.most), balance

    @glue
    def _transform(self, concepts: Tensor, here: Here) -> tuple[Tensor, Tensor | None]:
        """The blocks over padded concepts [R, M, d_c] of some rows. (z [R, M, d_c]; balance loss of all rows [B])"""
        sequence, mask = here.place(concepts.shape[1])
        dim = self.config.head_dim if self.config.kv_lora_rank is None else self.config.qk_rope_head_dim
        angles = rotary(sequence.position_ids, dim, theta=self.config.rope_theta)
        streams = concepts.unsqueeze(2).expand(-1, -1, self.config.num_streams, -1)
        balance: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            cache = None if here.state is None else partial(here.keep, str(i))
            output = BlockOutput(*layer(streams, angles, mask, sequence, None, None, cache))
            streams = output.streams
            record(layer, output, balance)
        if not balance:
            return self.norm(self.exit(streams)), None
        loss = torch.stack(balance).mean(dim=0)
        if here.state is not None:  # the rows that form no concept have none
            loss = loss.new_zeros(len(here.state.lengths)).index_put((here.rows,), loss)
        return self.norm(self.exit(streams)), loss


@dataclass(frozen=True)
class Here:
    """Where the new concepts of a forward are and go: `some` among the R `rows` that form any, to the slots [N] of the
    decode state, of which `most` are then in use in any row; `document` [N] of each, `documents` [R, S] of all that
    these rows then have. Without a state all rows take part, and the new concepts are all there is.
    """

    some: Formed
    rows: Tensor
    slots: Tensor
    most: int
    document: Tensor
    documents: Tensor
    state: ConceptState | None

    @classmethod
    @torch.compiler.disable
    def of(cls, formed: Formed, document: Tensor, position: Tensor, state: ConceptState | None) -> Here:
        if state is None:
            rows = torch.arange(len(formed.counts), device=document.device)
            return cls(formed, rows, formed.rank, 0, document, formed.pad(document, NOWHERE), None)
        rows = formed.row if formed.whole else formed.counts.nonzero().squeeze(1)
        slots = state.lengths[formed.row] + formed.rank
        most = int((state.lengths + formed.counts).max())
        state.write("document", formed.row, slots, document, most)
        state.write("position", formed.row, slots, position, most)
        documents = state.read("document", rows, int(slots.max()) + 1)
        return cls(formed.among(rows), rows, slots, most, document, documents, state)

    @torch.compiler.disable
    def place(self, most: int) -> tuple[Sequence, Tensor | None]:
        """Where the concepts, padded to [R, most], stand among those of their documents; and what each sees of
        `documents`, bool [R, 1, most, S], or None if it is all of them.
        """
        if self.state is not None and most == 1:  # each is the last of its row, behind which there is no document
            sees = (self.documents == self.document[:, None]).unsqueeze(1)
            alive = torch.ones_like(sees[..., 0])
            sequence = Sequence(sees.sum(dim=-1) - 1, alive, ~alive, self.document[:, None])
            return sequence, None if stepping(sees) and bool(sees.all()) else sees.unsqueeze(1)
        order = torch.arange(most, device=self.rows.device)
        alive = order < self.some.counts[:, None]
        at = order if self.state is None else self.state.lengths[self.rows][:, None] + order
        earlier = torch.arange(self.documents.shape[1], device=order.device) <= at[..., None]
        document = self.some.pad(self.document, NOWHERE)
        sees = earlier & (self.documents[:, None, :] == document[..., None])
        sequence = Sequence((sees.sum(dim=-1) - 1).clamp_min(0), alive, torch.zeros_like(alive), document)
        return sequence, (sees | ~alive[..., None]).unsqueeze(1)  # padding sees anything, to stay finite

    @torch.compiler.disable
    def keep(self, name: str, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A cache: keep keys and values [R, H, M, n] of the new concepts, and hand out all that these rows have."""
        assert self.state is not None
        whole = self.some.whole
        row = self.rows if whole else self.rows[self.some.row]
        for part, values in ((f"{name}_key", key), (f"{name}_value", value)):
            new = values[:, :, 0] if whole else values[self.some.row, :, self.some.rank]
            self.state.write(part, row, self.slots, new, self.most)
        here = self.documents.shape[1]
        return self.state.read(f"{name}_key", self.rows, here), self.state.read(f"{name}_value", self.rows, here)


def _kept(state: ConceptState, sequence: Sequence, most: int | None = None) -> tuple[Tensor, Tensor, Places] | None:
    """Keys, values and places of all that tokens may read, if there is anything."""
    most = state.most if most is None else most
    if not most:
        return None
    parts = [state.read(name, None, most) for name in ("read_key", "read_value", "document", "position")]
    return parts[0], parts[1], Places(sequence.document, sequence.position_ids, parts[2], parts[3])
