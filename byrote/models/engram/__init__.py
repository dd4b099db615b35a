"""A DeepSeek-style language model (MLA, DeepSeekMoE) with Engram memories."""

from byrote.models.engram.configuration import EngramConfig
from byrote.models.engram.modeling import EngramForCausalLM, EngramModel

__all__ = ["EngramConfig", "EngramForCausalLM", "EngramModel"]
