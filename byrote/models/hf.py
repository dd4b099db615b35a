"""Every private name of transformers that byrote touches, in one file; tested on the oldest and newest version.

`MemoryGenerationMixin` makes `generate` good for a model whose cache has a memory layer:

- `_prepare_cache_for_generation` appends the layer before the first forward, so that `activate_past_recording`,
  which assisted decoding calls right after, reaches it;
- `create_masks_for_generate` keeps the attention mask [B, S]: the model builds its own, with document boundaries;
- `_get_candidate_generator` answers `use_mtp=True` with the model's own drafter, which works on the modules in memory
  (transformers' would build new ones and read their weights again), and keeps what it counts in `model.drafts`;
- `generate_batch` and `init_continuous_batching`, which decode over pages of a cache of their own, are refused;
- `_valid_auto_compile_criteria` keeps `generate` from compiling a forward that reads tables and looks at lengths.

`saves_adapter` asks what `save_pretrained` would write of a model.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList

from byrote.memory.state import MemoryState


def attends_eagerly(config: PreTrainedConfig) -> bool:
    """Whether `attn_implementation="eager"` was asked for: attention by plain products, which has weights to show."""
    return config._attn_implementation == "eager"


def saves_adapter(model: PreTrainedModel) -> bool:
    """Whether the model has an adapter of transformers' own, so that `save_pretrained` writes that and no config."""
    return getattr(model, "_hf_peft_config_loaded", False)


class MemoryGenerationMixin(GenerationMixin):
    """Generation for models that say by `attach_memory_state(cache)` how their memory joins a cache."""

    def attach_memory_state(self, cache: Cache) -> MemoryState:
        raise NotImplementedError

    def make_drafter(self, generation_config: GenerationConfig, logits_processor: LogitsProcessorList) -> Any:
        """A transformers CandidateGenerator with `counts` of what it drafted."""
        raise NotImplementedError

    def _get_candidate_generator(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        *args: Any,
        logits_processor: LogitsProcessorList,
        **kwargs: Any,
    ) -> Any:
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(  # type: ignore[misc]
                generation_config, *args, logits_processor=logits_processor, **kwargs
            )
        drafter = self.make_drafter(generation_config=generation_config, logits_processor=logits_processor)
        self.drafts = drafter.counts
        return drafter

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        result = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            state = self.attach_memory_state(cache)
            if generation_config.is_assistant:
                state.activate_past_recording()
        return result

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *args: Any,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        inputs = prepare(input_ids, *args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and input_ids.shape == embeds.shape[:2]:
            inputs["input_ids"] = input_ids  # transformers leaves them out; a memory is addressed by them
        return inputs

    @property
    def init_continuous_batching(self) -> NoReturn:  # type: ignore[override]
        # Who asks whether it is there, as `transformers serve` does, goes on without it.
        raise AttributeError("continuous batching keeps pages of keys and values, which hold no state of a memory")

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        raise ValueError(
            "generate_batch keeps pages of keys and values, which hold no state of a memory: call generate, with "
            "prompts padded at the left (in GRPOConfig: use_transformers_continuous_batching=False)"
        )

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        return attention_mask
