"""DLCMModel and DLCMForCausalLM: the Hugging Face classes. How a token travels:

input_ids -> Sequence (alive, document starts) -> tickets of the encoder's memories   (from ids alone)
          -> embedding -> encoder -> norm: h -> h + what it reads of the concepts (byrote.models.dlcm.concepts)
          -> decoder -> norm -> head

Dynamic Large Concept Models, 2512.24617, section 3. Without concept layers: embedding, layers, norm, head; a Llama.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import can_return_tuple

from byrote.address.hashing import check_known
from byrote.memory import MemoryState, Ticket
from byrote.memory.concepts import ConceptState
from byrote.memory.state import Field
from byrote.models.block import BlockOutput, exit_of
from byrote.models.dlcm.block import TokenBlock
from byrote.models.dlcm.concepts import ConceptStage
from byrote.models.dlcm.configuration import DLCMConfig
from byrote.models.dlcm.outputs import DLCMModelOutput, DLCMOutput
from byrote.models.dlcm.pretrained import DLCMPreTrainedModel
from byrote.models.hf import MemoryGenerationMixin
from byrote.models.inputs import check_ids, check_labels, check_places
from byrote.models.memories import make_memories, memory_fields
from byrote.models.place import attention_cache, length, place
from byrote.nn.boundary import parser_loss
from byrote.nn.loss import head_loss
from byrote.nn.mtp import shift
from byrote.nn.norm import RMSNorm
from byrote.nn.rope import rotary


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
        fields = memory_fields(self.memories, self.encoder)
        if self.concepts is not None:
            size = self.concepts.boundary.scan_size or self.config.hidden_size
            exact = torch.promote_types(self.embed_tokens.weight.dtype, torch.float32)
            fields["query"] = Field(1, (size,), dtype=exact)
            # No tail at all: it tells the cache of another concept transformer, whose keys would be no good here.
            opens = self.config.boundary_convention == "open"
            fields["concepts"] = Field(0, (len(self.concepts.layers), self.config.concept_size, opens))
        return fields

    def attach_memory_state(self, cache: Cache) -> ConceptState:
        state = ConceptState.attach(cache, self.config.num_hidden_layers, self.memory_fields())
        assert isinstance(state, ConceptState)
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
        output_hidden_states: bool | None = None,
        boundaries: Tensor | None = None,
        boundaries_only: bool = False,
        **kwargs: Any,
    ) -> DLCMModelOutput:
        """input_ids int64 [B, T]; attention_mask [B, past + T], 0 at padding; position_ids [B, T], 0 at a new document;
        without position_ids the tokens go on with the last document.

        `boundaries` bool [B, T]: where concepts end, in place of the model's own choice. `inputs_embeds` [B, T, d] may
        replace the embedding, never the ids. `output_hidden_states`: before each token block and after the last.
        `boundaries_only`: go no further than to choose them.
        """
        input_ids = check_ids(input_ids, inputs_embeds, self.config.hidden_size)
        if boundaries is not None and self.concepts is None:
            raise ValueError("boundaries are of concepts, and num_concept_layers=0 has none: leave them out")
        if boundaries is not None and (boundaries.shape != input_ids.shape or boundaries.dtype != torch.bool):
            raise ValueError(
                f"boundaries must be bool {list(input_ids.shape)}, got {boundaries.dtype} {list(boundaries.shape)}"
            )
        past_key_values = self._cache(past_key_values, use_cache)
        past = length(past_key_values)
        check_places(input_ids, attention_mask, position_ids, int(past))
        state = None if past_key_values is None else self.attach_memory_state(past_key_values)
        if state is not None:
            begun = input_ids.shape[0], self.config.hidden_size, self.embed_tokens.weight.dtype, input_ids.device
            state.begin(begun[0], begun[2], begun[3])
            state.begin_concepts(*begun)
        places = attention_mask, position_ids, past, past_key_values, state
        sequence, mask = place(input_ids, *places)
        tickets: dict[int, Ticket] = {}
        if self.memories is None:
            check_known(input_ids, self.config.vocab_size, sequence.alive)
        else:
            tickets = self.memories(input_ids, sequence, state)
        # From here on nothing is refused. Only what stands under padding may still be no id.
        x = inputs_embeds
        if x is None:
            x = self.embed_tokens(input_ids.clamp(0, self.config.vocab_size - 1))
        if state is not None:
            state.advance("position", sequence.position_ids, sequence)
            state.advance("document", sequence.document, sequence)
        dim = self.config.head_dim if self.config.kv_lora_rank is None else self.config.qk_rope_head_dim
        angles = rotary(sequence.position_ids, dim, theta=self.config.rope_theta)
        hidden_states: list[Tensor] = []

        def run(layers: nn.ModuleList, x: Tensor, first: int) -> Tensor:
            streams = x.unsqueeze(2).expand(-1, -1, self.config.num_streams, -1)
            for i, layer in enumerate(layers, start=first):
                hidden_states.append(streams)
                tail = None if state is None else state.tails.get(f"convolution.{i}")
                cache = attention_cache(past_key_values, i)
                output = BlockOutput(*layer(streams, angles, mask, sequence, tickets.get(i), tail, cache))
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
        hidden_states.append(streams)
        return DLCMModelOutput(
            last_hidden_state=self.norm(self.exit(streams)),
            past_key_values=past_key_values,
            hidden_states=tuple(s.mean(dim=2) for s in hidden_states) if output_hidden_states else None,
            boundary_probabilities=None if found is None else found.probabilities,
            boundaries=None if found is None else found.boundaries,
            alive=sequence.alive,
            balance_loss=None if found is None else found.balance_loss,
        )

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> Cache | None:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise ValueError("past_key_values cannot be filled under gradient checkpointing: pass use_cache=False")
            return None
        if self.config.boundary_convention == "literal" and (use_cache or cache is not None):
            raise ValueError(
                "boundary_convention='literal' pools tokens that are not there yet: it cannot be decoded with a cache; "
                "pass use_cache=False, or train with 'close' or 'open'"
            )
        return DynamicCache(config=self.config) if use_cache and cache is None else cache


class DLCMForCausalLM(DLCMPreTrainedModel, MemoryGenerationMixin):
    """The language model. loss = cross-entropy of the next token; in training + lambda * the global parser's loss
    (byrote.nn.boundary) and, with experts, + alpha * sequence-wise balance loss.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DLCMConfig, vocabulary: np.ndarray | None = None) -> None:
        super().__init__(config)
        self.model = DLCMModel(config, vocabulary)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def choose_boundaries(self, input_ids: Tensor, **places: Any) -> tuple[Tensor, Tensor]:
        """(boundaries [B, T], as a forward over these tokens would choose or draw them; [2]: how many, of how many
        tokens). What a step in several micro-batches needs first: the loss of each depends on the rate in all.
        """
        if self.model.concepts is None:
            raise ValueError("num_concept_layers=0: a model without concepts chooses no boundaries")
        found = self.model(input_ids, use_cache=False, boundaries_only=True, **places)
        return found.boundaries, torch.stack([found.boundaries.sum(), found.alive.sum()]).to(torch.float64)

    def attach_memory_state(self, cache: Cache) -> MemoryState:
        return self.model.attach_memory_state(cache)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        boundaries: Tensor | None = None,
        boundary_counts: Tensor | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> DLCMOutput:
        """As DLCMModel; labels int64 [B, T] are the ids themselves (shifted here), -100: nothing is predicted.

        `boundary_counts` [2]: boundaries and tokens of the whole step, over all processes and micro-batches, divided by
        the number of processes; unless given, those of this batch, over all processes, and the loss of their rate is
        weighted by the share of `num_items_in_batch` that this batch predicts. `skip_logits`: with labels,
        make and return no logits.
        """
        check_labels(labels, input_ids, self.config.vocab_size)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache if labels is None or use_cache is not None else False,
            output_hidden_states=kwargs.get("output_hidden_states"),
            boundaries=boundaries,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        skip_logits = skip_logits and labels is not None
        # muP's factor stands before the head, where it is cheap (equation 21).
        hidden = outputs.last_hidden_state / self.config.token_scale
        logits = None if skip_logits else self.lm_head(hidden[:, kept, :])
        loss, parser = None, None
        if labels is not None:
            items = (labels[:, 1:] != -100).sum(dim=1)
            total = items.sum() if num_items_in_batch is None else num_items_in_batch
            if skip_logits:
                loss = head_loss(self.lm_head, hidden, shift(labels, 1, empty=-100)) / total
            else:
                loss = self.loss_function(
                    logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
                )
            if self.training and outputs.balance_loss is not None:
                loss = loss + self.config.balance_loss_alpha * (outputs.balance_loss * items).sum() / total
            if self.training and outputs.boundaries is not None and self.config.boundary_mode != "rule":
                counts, predicted = boundary_counts, total
                if counts is None:
                    counts, predicted = _over_processes(outputs, items.sum())
                parser = parser_loss(
                    outputs.boundary_probabilities,
                    outputs.boundaries,
                    outputs.alive,
                    self.config.compression_ratio,
                    counts,
                )
                if num_items_in_batch is not None:  # one micro-batch, which knows its own rate alone, of several
                    parser = parser * (predicted / total)
                loss = loss + self.config.boundary_weight * parser
        return DLCMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            boundary_probabilities=outputs.boundary_probabilities,
            boundaries=outputs.boundaries,
            alive=outputs.alive,
            parser_loss=None if parser is None else parser.detach(),
        )


def _over_processes(outputs: DLCMModelOutput, items: Tensor) -> tuple[Tensor | None, Tensor]:
    """Boundaries and tokens, None if there is one process alone; predicted tokens: means over the processes."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None, items
    assert outputs.boundaries is not None and outputs.alive is not None
    counts = torch.stack([outputs.boundaries.sum(), outputs.alive.sum(), items]).to(torch.float64)
    dist.all_reduce(counts)
    counts /= dist.get_world_size()
    return counts[:2], counts[2]
