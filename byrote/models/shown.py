"""What a forward shows of its inside when it is asked to: hidden states, and the weights of its attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from byrote.models.hf import attends_eagerly
from byrote.nn.eager import Shares


@dataclass
class Shown:
    """`states`: True for all hidden states, or the numbers of some. `shares`: handed to every attention, if eager."""

    states: bool | int | list[int]
    attentions: bool
    shares: Shares | None
    kept: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        output_hidden_states: bool | int | list[int] | None,
        output_attentions: bool | None,
    ) -> Shown:
        """Where an argument is None the config says what it says. ValueError where attention has no weights to show."""
        states: Any = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attentions = config.output_attentions if output_attentions is None else output_attentions
        eager = attends_eagerly(config)
        if attentions and not eager:
            raise ValueError(
                "output_attentions=True: only attn_implementation='eager' makes attention weights; give it to "
                "from_pretrained, or call model.set_attn_implementation('eager')"
            )
        return cls(states, bool(attentions), Shares() if eager else None)

    def keep(self, x: Tensor) -> Tensor:
        """Keep x [B, T, d], or the mean of streams x [B, T, n, d]; returned is x, by way of what is kept if it can be,
        so that a hidden state has a gradient.
        """
        if self.states is False:
            return x
        if x.dim() == 4 and x.shape[2] > 1:
            self.kept.append(x.mean(dim=2))
            return x
        self.kept.append(x.flatten(2))
        return self.kept[-1].view_as(x)

    def hidden_states(self, last: Tensor) -> tuple[Any, ...] | None:
        """All that was kept and the last, None in the place of one that was not asked for."""
        if self.states is False:
            return None
        states = (*self.kept, last)
        if self.states is True:
            return states
        numbers = [self.states] if isinstance(self.states, int) else self.states
        wanted = {number % len(states) for number in numbers if -len(states) <= number < len(states)}
        return tuple(state if number in wanted else None for number, state in enumerate(states))

    def weights(self) -> tuple[Tensor, ...] | None:
        """Of every block, [B, H, T, S]."""
        return tuple(self.shares.seen) if self.attentions and self.shares is not None else None
