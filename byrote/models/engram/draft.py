"""Drafts from the prediction modules: `model.generate(..., use_mtp=True)`, one row at a time.

A step knows the tokens t_0 .. t_P and the trunk's streams at 0 .. P-1; the trunk has not seen t_P, its newest. At place
P-1, module 1 reads t_P and drafts t_{P+1}, module 2 reads that draft and drafts t_{P+2}, and so on: D drafts, which
the trunk then checks in one forward (speculative sampling, 2211.17192; with drafts rejected by transformers).

Module k at place i reads t_{i+k}. So its last k-1 places, P-k+1 .. P-1, rest on drafts. After each step they are
forgotten, accepted or not, and the next step computes them from true tokens: what is drafted is what a module without a
cache would draft. For that, module k keeps the latents of places 0 .. P-k and the one input h^{k-1} at P-k+1.

Only the current document matters: what came before it, left padding too, is left out, and places count from its start.
Where the modules do not see all of a document as it is (its beginning is in the cache already, the prompt is padded at
the right) drafts are worse, never wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation import CandidateGenerator, LogitsProcessorList

from byrote.memory import MemoryState, Sequence
from byrote.models.block import BlockOutput
from byrote.models.engram.configuration import EngramConfig
from byrote.nn.rope import rotary


@dataclass
class DraftCounts:
    """Of one `generate`: forwards of the trunk, tokens drafted, and how many of these were accepted."""

    forwards: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def tokens(self) -> int:
        """New tokens: each forward gives one of its own behind the accepted ones."""
        return self.accepted + self.forwards


class Past:
    """What one module knows: latents of the first `length` places, and its inputs from there on, [1, *, n, d]."""

    def __init__(self) -> None:
        self.length = 0
        self.latent: Tensor | None = None
        self.rope_key: Tensor | None = None
        self.inputs: Tensor | None = None

    def update(self, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        """The cache of `byrote.nn.mla.MLA`."""
        if self.latent is not None and self.rope_key is not None:
            latent = torch.cat([self.latent, latent], dim=2)
            rope_key = torch.cat([self.rope_key, rope_key], dim=2)
        self.latent, self.rope_key = latent, rope_key
        return latent, rope_key

    def receive(self, inputs: Tensor) -> Tensor:
        """All inputs from place `length` on."""
        self.inputs = inputs if self.inputs is None else torch.cat([self.inputs, inputs], dim=1)
        return self.inputs

    def keep(self, length: int, true_inputs: int) -> None:
        """Forget the latents from place `length` on, and the inputs from place `true_inputs` on."""
        assert self.inputs is not None and self.latent is not None and self.rope_key is not None
        self.inputs = self.inputs[:, length - self.length : max(0, true_inputs - self.length)]
        self.latent, self.rope_key = self.latent[:, :, :length], self.rope_key[:, :, :length]
        self.length = length


class Drafter(CandidateGenerator):
    """`embed_tokens`, `modules` and `head` are the model's: its prediction modules, and what stands around them."""

    requires_model_outputs = True
    model_kwargs_overrides = {"output_streams": True}  # noqa: RUF012

    def __init__(
        self,
        config: EngramConfig,
        embed_tokens: nn.Module,
        modules: nn.ModuleList,
        head: nn.Module,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
    ) -> None:
        if not modules:
            raise ValueError(
                "the model has no modules that draft (num_nextn_predict_layers=0): train one with "
                "num_nextn_predict_layers=1, or generate without drafts"
            )
        self.config, self.embed_tokens, self.modules, self.head = config, embed_tokens, modules, head
        self.processor = logits_processor
        self.sample, self.max_length = bool(generation_config.do_sample), generation_config.max_length
        ends = generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.counts = DraftCounts()
        self.past = [Past() for _ in modules]
        self.ids: Tensor | None = None  # of the document so far, [1, P + 1]
        self.offered = 0

    def get_candidates(  # type: ignore[override]
        self,
        input_ids: Tensor,
        model_outputs: Any = None,
        is_first_iteration: bool = False,
        n_last_matches: int = 0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """input_ids [1, S] -> these and the drafts [1, S + n], and the drafts' logits [1, n, V]."""
        room = self.max_length - input_ids.shape[1] - 1
        self.offered = 0
        if is_first_iteration or input_ids.shape[0] > 1:
            return input_ids, None  # the trunk has to come first; more rows are refused by the caller
        streams = self._advance(input_ids, model_outputs, int(n_last_matches))
        drafts, logits = self._draft(input_ids, streams, room)
        self.offered = len(drafts)
        if not drafts:
            return input_ids, None
        return torch.cat([input_ids, *drafts], dim=1), torch.stack(logits, dim=1)

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        self.counts.forwards += 1
        self.counts.drafted += self.offered
        self.counts.accepted += int(num_matches)

    def _advance(self, input_ids: Tensor, outputs: Any, matches: int) -> Tensor:
        """Take note of the tokens that are true now; the trunk's streams at the new places."""
        streams: Tensor = outputs.streams
        if self.ids is not None:
            self.ids = torch.cat([self.ids, input_ids[:, -matches - 1 :].to(self.ids)], dim=1)
            return streams[:, : matches + 1]
        state = outputs.past_key_values.layers[-1]
        assert isinstance(state, MemoryState)
        processed = input_ids.shape[1] - 1
        slots = torch.arange(processed - streams.shape[1], processed, device=input_ids.device)
        present = slots >= state.tails["document"][0, 0].to(slots.device)
        self.ids = torch.cat([input_ids[:, slots[present]], input_ids[:, -1:]], dim=1)
        return streams[:, present.to(streams.device)]

    def _draft(self, input_ids: Tensor, streams: Tensor, room: int) -> tuple[list[Tensor], list[Tensor]]:
        """Each module in turn drafts a token [1, 1] with logits [1, V]; no more than `room`, none behind an end."""
        assert self.ids is not None
        known, new = self.ids, self.ids.shape[1] - 1
        drafts: list[Tensor] = []
        all_logits: list[Tensor] = []
        for k, (module, past) in enumerate(zip(self.modules, self.past, strict=True), start=1):
            inputs = past.receive(streams)
            assert inputs.shape[1] == new - past.length and known.shape[1] == new + k
            hidden, streams = self._run(module, past, known[:, past.length + k :], inputs)
            # True are module k's places up to P-k, and its inputs, which module k-1 made, up to P-k+1.
            past.keep(max(0, new - k + 1), max(0, new - k + 2))
            logits = self.head(hidden[:, -1]).float()
            logits = self.processor(torch.cat([input_ids, *drafts], dim=1), logits)  # type: ignore[arg-type]
            chosen = torch.multinomial(logits.softmax(-1), 1) if self.sample else logits.argmax(-1, keepdim=True)
            drafts.append(chosen)
            all_logits.append(logits)
            known = torch.cat([known, chosen], dim=1)
        ended = next((i for i, draft in enumerate(drafts, start=1) if int(draft) in self.ends), len(drafts))
        count = max(0, min(room, ended))
        return drafts[:count], all_logits[:count]

    def _run(self, module: nn.Module, past: Past, next_ids: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden [1, T, d], streams [1, T, n, d]) at the places behind those that `past` knows."""
        config, device = self.config, inputs.device
        places = torch.arange(past.length + inputs.shape[1], device=device)
        queries = places[past.length :]
        angles = rotary(queries[None], config.qk_rope_head_dim, theta=config.rope_theta, yarn=config.yarn_parameters)
        alive = torch.ones_like(queries[None], dtype=torch.bool)
        sequence = Sequence(queries[None], alive, starts=~alive, document=torch.zeros_like(queries[None]))
        mask = (places <= queries[:, None])[None, None]
        embeddings = self.embed_tokens(next_ids)
        hidden, output = module(embeddings, inputs, angles, mask, sequence, None, None, past.update)
        return hidden, BlockOutput(*output).streams
