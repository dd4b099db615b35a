"""DLCMModel: a DLCM without its head. How a token travels:

input_ids -> Sequence (alive, document starts) -> tickets of the encoder's memories   (byrote.models.inputs)
          -> embedding -> encoder -> norm: h -> h + what it reads of the concepts (byrote.models.dlcm.stage)
          -> decoder -> norm

Dynamic Large Concept Models, 2512.24617, section 3. Without concept layers: embedding, layers, norm; a Llama.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from byrote.memory.concept_state import ConceptState
from byrote.memory.state import Field
from byrote.models.arguments import check_arguments
from byrote.models.block import BlockOutput, exit_of
from byrote.models.dlcm.block import TokenBlock
from byrote.models.dlcm.configuration import DLCMConfig
from byrote.models.dlcm.pretrained import DLCMPreTrainedModel
from byrote.models.dlcm.stage import ConceptStage
from byrote.models.inputs import Inputs, attention_cache
from byrote.models.memories import make_memories, memory_fields
from byrote.models.shown import Shown
from byrote.nn.norm import RMSNorm
from byrote.nn.rope import rotary


@dataclass
class DLCMModelOutput(BaseModelOutputWithPast):
    """boundary_probabilities, boundaries, alive [B, T] of the new tokens; balance_loss [B] of the experts."""

    boundary_probabilities: Tensor | None = None
    boundaries: Tensor | None = None
    alive: Tensor | None = None
    balance_loss: Tensor | None = None


@dataclass
class DLCMOutput(CausalLMOutputWithPast):
    """As above; parser_loss: in training, the unweighted loss of the compression, without a graph."""

    boundary_probabilities: Tensor | None = None
    boundaries: Tensor | None = None
    alive: Tensor | None = None
    parser_loss: Tensor | None = None


class DLCMModel(DLCMPreTrainedModel):
    """The trunk. `vocabulary`: the map of `byrote.address.compress(tokenizer)`, if the config has memories."""

    def __init__(self, config: DLCMConfig, vocabulary: np.ndarray | None = None) -> None:
        super().__init__(config)
        d, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.memories = make_memories(config, vocabulary)
        self.encoder = nn.ModuleList([TokenBlock(config, i) for i in range(config.num_encoder_layers)])
        self.concepts: ConceptStage | None = None
        if config.num_concept_layers:
            self.encoder_exit = exit_of(config, d)
            self.encoder_norm = RMSNorm(d, eps=eps)
            self.concepts = ConceptStage(config)
        decoder = range(config.num_encoder_layers, config.num_hidden_layers)
        self.decoder = nn.ModuleList([TokenBlock(config, i) for i in decoder])
        self.exit = exit_of(config, d)
        self.norm = RMSNorm(d, eps=eps)
        self.gradient_checkpointing = False
        self._mark_scales()
        self.post_init()

    def memory_fields(self) -> dict[str, Field]:
        """The tails that a decode state of this model holds."""
        fields = memory_fields(self.memories, self.config)
        if self.concepts is not None:
            exact = torch.promote_types(self.dtype, torch.float32)
            fields["query"] = Field(1, (self.config.query_size,), dtype=exact)
            # No tail at all: it tells the cache of another concept transformer, whose keys would be no good here.
            opens = self.config.boundary_convention == "open"
            fields["concepts"] = Field(0, (self.config.num_concept_layers, self.config.concept_size, opens))
        return fields

    def attach_memory_state(self, cache: Cache) -> ConceptState:
        state = ConceptState.attach(cache, self.config.num_hidden_layers, self.memory_fields())
        assert isinstance(state, ConceptState)
        return state

    def _decode_state(self, inputs: Inputs) -> ConceptState | None:
        """The memory's layer in the cache, made for as many rows as there are, unless it has some already."""
        if inputs.cache is None:
            return None
        state = self.attach_memory_state(inputs.cache)
        rows, dtype, device = len(inputs.ids), self.dtype, inputs.ids.device
        state.begin(rows, dtype, device)
        state.begin_concepts(rows, self.config.hidden_size, dtype, device)
        return state

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        boundaries: Tensor | None = None,
        boundaries_only: bool = False,
        **kwargs: Any,
    ) -> DLCMModelOutput:
        """input_ids int64 [B, T]; attention_mask [B, past + T], 0 at padding; position_ids [B, T], 0 at a new document;
        without position_ids the tokens go on with the last document.

        `boundaries` bool [B, T]: where concepts end, in place of the model's own choice. `inputs_embeds` [B, T, d] may
        replace the embedding, never the ids that address a memory. `output_hidden_states`: before each token block, and
        what the head reads; numbers ask for some. `output_attentions`: the weights [B, H, T, S] of each token block.
        `boundaries_only`: go no further than to choose them.
        """
        check_arguments(kwargs, type(self).forward)
        shown = Shown.of(self.config, output_hidden_states, output_attentions)
        past_key_values = self._cache(past_key_values, use_cache)
        places = attention_mask, position_ids, past_key_values
        inputs = Inputs.of(self.config, input_ids, *places, inputs_embeds, kwargs)
        self._check_boundaries(boundaries, inputs.ids)
        state = self._decode_state(inputs)
        x, sequence, mask, tickets = inputs.enter(self.embed_tokens, self.memories, state)
        dim = self.config.head_dim if self.config.kv_lora_rank is None else self.config.qk_rope_head_dim
        angles = rotary(sequence.position_ids, dim, theta=self.config.rope_theta)

        def run(layers: nn.ModuleList, x: Tensor, first: int) -> Tensor:
            streams = shown.keep(x).unsqueeze(2).expand(-1, -1, self.config.num_streams, -1)
            for i, layer in enumerate(layers, start=first):
                if i > first:
                    streams = shown.keep(streams)
                tail = None if state is None else state.tails.get(f"convolution.{i}")
                cache = attention_cache(past_key_values, i)
                output = BlockOutput(*layer(streams, angles, mask, sequence, tickets.get(i), tail, cache, shown.shares))
                streams = output.streams
                if state is not None and output.columns is not None:
                    state.advance(f"convolution.{i}", output.columns, sequence)
            return streams

        streams = run(self.encoder, x, 0)
        found = None
        if self.concepts is not None:
            h = self.encoder_norm(self.encoder_exit(streams))
            if boundaries_only:
                p, chosen, _ = self.concepts.choose(h, sequence, state)
                return DLCMModelOutput(boundary_probabilities=p, boundaries=chosen, alive=sequence.alive)
            found = self.concepts(h, sequence, state, boundaries)
            streams = run(self.decoder, h + found.addend, len(self.encoder))
        last = self.norm(self.exit(streams))
        return DLCMModelOutput(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=shown.hidden_states(last),
            attentions=shown.weights(),
            boundary_probabilities=None if found is None else found.probabilities,
            boundaries=None if found is None else found.boundaries,
            alive=sequence.alive,
            balance_loss=None if found is None else found.balance_loss,
        )

    def _check_boundaries(self, boundaries: Tensor | None, input_ids: Tensor) -> None:
        if boundaries is None:
            return
        if self.concepts is None:
            raise ValueError("boundaries are of concepts, and num_concept_layers=0 has none: leave them out")
        if boundaries.shape != input_ids.shape or boundaries.dtype != torch.bool:
            raise ValueError(
                f"boundaries must be bool {list(input_ids.shape)}, got {boundaries.dtype} {list(boundaries.shape)}"
            )

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        cached = super()._cache(cache, use_cache)
        if cached is not None and self.config.boundary_convention == "literal":
            raise ValueError(
                "boundary_convention='literal' pools tokens that are not there yet: it cannot be decoded with a cache; "
                "pass use_cache=False, or train with 'close' or 'open'"
            )
        return cached
