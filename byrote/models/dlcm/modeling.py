"""DLCMForCausalLM: the language model, trunk (byrote.models.dlcm.trunk) and head, and its loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from byrote.memory import MemoryState
from byrote.models.arguments import check_arguments
from byrote.models.dlcm.configuration import DLCMConfig
from byrote.models.dlcm.pretrained import DLCMPreTrainedModel
from byrote.models.dlcm.trunk import DLCMModel, DLCMModelOutput, DLCMOutput
from byrote.models.hf import MemoryGenerationMixin
from byrote.models.inputs import target_counts, targets_of
from byrote.nn.boundary import parser_loss
from byrote.ops.cross_entropy import head_loss


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
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        boundaries: Tensor | None = None,
        boundary_counts: Tensor | None = None,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> DLCMOutput:
        """As DLCMModel; labels int64 [B, T] are the ids themselves (shifted here), -100: nothing is predicted.
        `shift_labels` [B, T] in their place are shifted already, as context parallelism needs them.

        `boundary_counts` [2]: boundaries and tokens of the whole step, over all processes and micro-batches, divided by
        the number of processes; unless given, those of this batch, over all processes, and the loss of their rate is
        weighted by the share of `num_items_in_batch` that this batch predicts. `skip_logits`: with labels,
        make and return no logits.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # no argument: the Trainer would ask each batch for it
        check_arguments(kwargs, type(self).forward)
        targets = targets_of(
            labels, shift_labels, inputs_embeds if input_ids is None else input_ids, self.config.vocab_size
        )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache if targets is None or use_cache is not None else False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            boundaries=boundaries,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        skip_logits = skip_logits and targets is not None
        # muP's factor stands before the head, where it is cheap (equation 21).
        hidden = outputs.last_hidden_state / self.config.token_scale
        logits = None if skip_logits else self.lm_head(hidden[:, kept, :])
        loss, parser = None, None
        if targets is not None:
            items, total = target_counts(targets, num_items_in_batch)
            if skip_logits:
                loss = head_loss(self.lm_head, hidden, targets) / total
            else:
                nothing = num_items_in_batch is None and not bool(items.any())
                loss = self.loss_function(
                    logits,
                    labels,
                    vocab_size=self.config.vocab_size,
                    num_items_in_batch=total if nothing else num_items_in_batch,
                    shift_labels=targets,
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
            attentions=outputs.attentions,
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
