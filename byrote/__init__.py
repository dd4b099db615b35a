"""byrote: language models that look things up instead of working them out."""

from byrote.models.engram import EngramConfig, EngramForCausalLM, EngramModel

__all__ = ["EngramConfig", "EngramForCausalLM", "EngramModel"]
__version__ = "0.1.0"
