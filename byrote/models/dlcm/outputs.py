"""What the forwards of a DLCM return beside Hugging Face's fields."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


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
