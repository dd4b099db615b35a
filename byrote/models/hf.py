"""Every private name of transformers that byrote touches, in one file; tested on the oldest and newest version.

`MemoryGenerationMixin` makes `generate` good for a model whose cache has a memory layer:

- `_prepare_cache_for_generation` appends the layer before the first forward, so that `activate_past_recording`,
  which assisted decoding calls right after, reaches it;
- `create_masks_for_generate` keeps the attention mask [B, S]: the model builds its own, with document boundaries;
- `_valid_auto_compile_criteria` keeps `generate` from compiling a forward that reads tables and looks at lengths.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache

from byrote.memory.state import MemoryState


class MemoryGenerationMixin(GenerationMixin):
    """Generation for models that say by `attach_memory_state(cache)` how their memory joins a cache."""

    def attach_memory_state(self, cache: Cache) -> MemoryState:
        raise NotImplementedError

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

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        return False

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        return attention_mask
