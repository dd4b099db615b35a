"""Trunks with a head that judges: a text (rewards, classes) or each of its tokens, as transformers' own models have it.

The head is transformers' `GenericForSequenceClassification` or `GenericForTokenClassification`: logits of the last
token that is not `config.pad_token_id`, or of every token. `from_pretrained` takes a language model's folder, tables
and all, and begins with a new head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from byrote.models.dlcm.pretrained import DLCMPreTrainedModel
from byrote.models.engram.modeling import EngramPreTrainedModel


class _Judge:
    """`vocabulary`: the map of `byrote.address.compress(tokenizer)`, as for a language model."""

    memory_stack: Any

    def __init__(self, config: Any, vocabulary: np.ndarray | None = None) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if vocabulary is not None and self.memory_stack is not None:
            self.memory_stack.know(vocabulary)


class EngramForSequenceClassification(_Judge, GenericForSequenceClassification, EngramPreTrainedModel):
    """logits [B, config.num_labels]; labels int64 [B], or float where `config.problem_type` says so."""


class EngramForTokenClassification(_Judge, GenericForTokenClassification, EngramPreTrainedModel):
    """logits [B, T, config.num_labels]; labels int64 [B, T], -100 where nothing is judged."""


class DLCMForSequenceClassification(_Judge, GenericForSequenceClassification, DLCMPreTrainedModel):
    """logits [B, config.num_labels]; labels int64 [B], or float where `config.problem_type` says so."""


class DLCMForTokenClassification(_Judge, GenericForTokenClassification, DLCMPreTrainedModel):
    """logits [B, T, config.num_labels]; labels int64 [B, T], -100 where nothing is judged."""
