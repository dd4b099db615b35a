"""EngramModel and EngramForCausalLM: the Hugging Face classes. How a token travels:

input_ids -> Sequence (alive, document starts) -> tickets of all memories   (from ids alone, before block 0)
          -> embedding -> streams [B, T, n, d] -> blocks -> exit (one stream again) -> norm -> head
                                                        -> in training: the prediction modules -> the same head
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from byrote.memory import MemoryState, Sequence
from byrote.memory.state import Field
from byrote.models.arguments import check_arguments
from byrote.models.block import BlockOutput, exit_of, record
from byrote.models.engram.block import EngramBlock
from byrote.models.engram.configuration import EngramConfig
from byrote.models.engram.draft import Drafter
from byrote.models.hf import MemoryGenerationMixin
from byrote.models.inputs import Inputs, attention_cache, target_counts, targets_of
from byrote.models.memories import make_memories, memory_fields
from byrote.models.pretrained import MemoryPreTrainedModel
from byrote.models.shown import Shown
from byrote.nn.mtp import PredictionModule, shift
from byrote.nn.norm import RMSNorm
from byrote.nn.rope import rotary
from byrote.ops.cross_entropy import head_loss


@dataclass
class EngramOutput(CausalLMOutputWithPast):
    """`mtp_loss`: in training, sum of CE_k / D, unweighted, without a graph. `streams` [B, T, n, d]: if asked for."""

    mtp_loss: Tensor | None = None
    streams: Tensor | None = None


class Prediction(NamedTuple):
    """Of one module: hidden [B, T, d] for the head; aimed bool [B, T], where the token to be predicted belongs."""

    hidden: Tensor
    aimed: Tensor


class EngramPreTrainedModel(MemoryPreTrainedModel):
    """What both classes share."""

    config_class = EngramConfig
    config: EngramConfig
    _no_split_modules = ["EngramBlock"]  # noqa: RUF012


class EngramModel(EngramPreTrainedModel):
    """The trunk. `vocabulary`: the map of `byrote.address.compress(tokenizer)` that the config was made with."""

    def __init__(self, config: EngramConfig, vocabulary: np.ndarray | None = None) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.memories = make_memories(config, vocabulary)
        self.layers = nn.ModuleList([EngramBlock(config, i) for i in range(config.num_hidden_layers)])
        self.exit = exit_of(config, config.hidden_size)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mtp = nn.ModuleList([_prediction_module(config, k) for k in range(config.num_nextn_predict_layers)])
        self.gradient_checkpointing = False
        self.post_init()

    def memory_fields(self) -> dict[str, Field]:
        """The tails that a decode state of this model holds."""
        return memory_fields(self.memories, self.config)

    def attach_memory_state(self, cache: Cache) -> MemoryState:
        return MemoryState.attach(cache, self.config.num_hidden_layers, self.memory_fields())

    def _decode_state(self, inputs: Inputs) -> MemoryState | None:
        """The memory's layer in the cache, made for as many rows as there are, unless it has some already."""
        if inputs.cache is None:
            return None
        state = self.attach_memory_state(inputs.cache)
        state.begin(len(inputs.ids), self.dtype, inputs.ids.device)
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
        output_streams: bool = False,
        predict: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids int64 [B, T]; attention_mask [B, past + T], 0 at padding; position_ids [B, T], 0 at a new document;
        without position_ids the tokens go on with the last document.

        `inputs_embeds` [B, T, d] may replace the embedding, not the ids that address a memory.
        `output_hidden_states`: the mean of the streams before each block, [B, T, d], and what the head reads; numbers
        ask for some. `output_attentions`: the weights [B, H, T, S] of each block. `output_streams`: those after the
        last, [B, T, n, d], as `streams`. `predict`: run the prediction modules over all of the new tokens and return
        what each found, as `predictions`.
        """
        check_arguments(kwargs, type(self).forward)
        shown = Shown.of(self.config, output_hidden_states, output_attentions)
        past_key_values = self._cache(past_key_values, use_cache)
        places = attention_mask, position_ids, past_key_values
        inputs = Inputs.of(self.config, input_ids, *places, inputs_embeds, kwargs)
        state = self._decode_state(inputs)
        embeddings, sequence, mask, tickets = inputs.enter(self.embed_tokens, self.memories, state)
        angles = rotary(
            sequence.position_ids,
            self.config.qk_rope_head_dim,
            theta=self.config.rope_theta,
            yarn=self.config.yarn_parameters,
        )
        streams = shown.keep(embeddings).unsqueeze(2).expand(-1, -1, self.config.num_streams, -1)
        balance: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if i:
                streams = shown.keep(streams)
            tail = state.tails.get(f"convolution.{i}") if state is not None else None
            cache = attention_cache(past_key_values, i)
            output = BlockOutput(*layer(streams, angles, mask, sequence, tickets.get(i), tail, cache, shown.shares))
            streams = output.streams
            if state is not None and output.columns is not None:
                state.advance(f"convolution.{i}", output.columns, sequence)
            record(layer, output, balance)
        last = self.norm(self.exit(streams))
        result = BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=None if use_cache is False else past_key_values,
            hidden_states=shown.hidden_states(last),
            attentions=shown.weights(),
        )
        if output_streams:
            result["streams"] = streams
        if predict:
            result["predictions"] = self._predict(embeddings, streams, angles, mask, sequence, balance)
        if balance:
            result["balance_loss"] = torch.stack(balance).mean(dim=0)
        return result

    def _predict(
        self,
        embeddings: Tensor,
        streams: Tensor,
        angles: Tensor,
        mask: Tensor | None,
        sequence: Sequence,
        balance: list[Tensor],
    ) -> list[Prediction]:
        """What each module predicts at every token; it counts where the token k places on is of the same document."""
        predictions = []
        for k, module in enumerate(self.mtp, start=1):
            known, aimed = (_same_document(sequence, steps) for steps in (k, k + 1))
            # The mask is the trunk's: what a known place may see is known, for it lies before it in its document.
            placed = replace(sequence, alive=known)
            hidden, output = module(shift(embeddings, k), streams, angles, mask, placed)
            output = BlockOutput(*output)
            streams = output.streams
            record(module.block, output, balance)
            predictions.append(Prediction(hidden, aimed))
        return predictions


class EngramForCausalLM(EngramPreTrainedModel, MemoryGenerationMixin):
    """The language model. loss = cross-entropy of the next token + alpha * sequence-wise balance loss; in training,
    with prediction modules, + weight * their loss (byrote.nn.mtp), and `mtp_loss` of the output is that loss alone.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: EngramConfig, vocabulary: np.ndarray | None = None) -> None:
        super().__init__(config)
        self.model = EngramModel(config, vocabulary)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def attach_memory_state(self, cache: Cache) -> MemoryState:
        return self.model.attach_memory_state(cache)

    def make_drafter(self, generation_config: GenerationConfig, logits_processor: LogitsProcessorList) -> Drafter:
        model = self.model
        return Drafter(self.config, model.embed_tokens, model.mtp, self.lm_head, generation_config, logits_processor)

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
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        mtp_loss_weight: float | None = None,
        output_streams: bool = False,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> EngramOutput:
        """As EngramModel; labels int64 [B, T] are the ids themselves (shifted here), -100: nothing is predicted.
        `shift_labels` [B, T] in their place are shifted already, as context parallelism needs them.

        `mtp_loss_weight`: the config's unless given. `skip_logits`: with labels, make and return no logits.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # no argument: the Trainer would ask each batch for it
        check_arguments(kwargs, type(self).forward)
        targets = targets_of(
            labels, shift_labels, inputs_embeds if input_ids is None else input_ids, self.config.vocab_size
        )
        predict = self.training and targets is not None and len(self.model.mtp) > 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache if targets is None or use_cache is not None else False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_streams=output_streams,
            predict=predict,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        skip_logits = skip_logits and targets is not None
        logits = None if skip_logits else self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss, further = None, None
        if targets is not None:
            items, total = target_counts(targets, num_items_in_batch)
            if skip_logits:
                loss = head_loss(self.lm_head, outputs.last_hidden_state, targets) / total
            else:
                nothing = num_items_in_batch is None and not bool(items.any())
                loss = self.loss_function(
                    logits,
                    labels,
                    vocab_size=self.config.vocab_size,
                    num_items_in_batch=total if nothing else num_items_in_batch,
                    shift_labels=targets,
                )
            if "balance_loss" in outputs:
                # Weighted by predicted tokens, so that any split of a batch into micro-batches gives the same sum.
                loss = loss + self.config.balance_loss_alpha * (outputs["balance_loss"] * items).sum() / total
            if predict:
                weight = self.config.mtp_loss_weight if mtp_loss_weight is None else mtp_loss_weight
                further = _mtp_loss(self.lm_head, outputs["predictions"], targets, total)
                loss = loss + weight * further
        return EngramOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            mtp_loss=None if further is None else further.detach(),
            streams=outputs.get("streams"),
        )


def _prediction_module(config: EngramConfig, k: int) -> PredictionModule:
    block = EngramBlock(config, config.num_hidden_layers + k)
    return PredictionModule(config.hidden_size, block, exit_of(config, config.hidden_size), eps=config.rms_norm_eps)


def _same_document(sequence: Sequence, steps: int) -> Tensor:
    """bool [B, T]: does an alive token of the same document stand `steps` places on?"""
    alive = sequence.alive & shift(sequence.alive, steps, empty=False)
    return alive & (shift(sequence.document, steps, empty=-1) == sequence.document)


def _mtp_loss(head: nn.Module, predictions: Iterable[Prediction], targets: Tensor, total: Tensor | int) -> Tensor:
    """1/D sum_k CE_k. All are divided by `total`, the head's number of `targets` (V3's T), so that a batch in parts has
    the loss of the whole.
    """
    losses = []
    for k, (hidden, aimed) in enumerate(predictions, start=1):
        further = shift(targets, k, empty=-100).masked_fill(~aimed, -100)
        losses.append(head_loss(head, hidden, further))
    return torch.stack(losses).mean() / total
