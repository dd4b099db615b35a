"""byrote: language models that look things up instead of working them out."""

from byrote.models.dlcm import DLCMConfig, DLCMForCausalLM, DLCMModel
from byrote.models.engram import EngramConfig, EngramForCausalLM, EngramModel

__all__ = ["DLCMConfig", "DLCMForCausalLM", "DLCMModel", "EngramConfig", "EngramForCausalLM", "EngramModel"]
__version__ = "0.1.0"
