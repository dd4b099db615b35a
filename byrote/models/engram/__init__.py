"""A DeepSeek-style language model (MLA, DeepSeekMoE) with Engram memories; registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from byrote.models.engram.configuration import EngramConfig
from byrote.models.engram.modeling import EngramForCausalLM, EngramModel

AutoConfig.register("byrote_engram", EngramConfig)
AutoModel.register(EngramConfig, EngramModel)
AutoModelForCausalLM.register(EngramConfig, EngramForCausalLM)

__all__ = ["EngramConfig", "EngramForCausalLM", "EngramModel"]
