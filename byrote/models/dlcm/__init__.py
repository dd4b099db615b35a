"""Dynamic large concept models, and the plain Llama that they are compared with."""

from byrote.models.dlcm.configuration import DLCMConfig
from byrote.models.dlcm.modeling import DLCMForCausalLM
from byrote.models.dlcm.trunk import DLCMModel

__all__ = ["DLCMConfig", "DLCMForCausalLM", "DLCMModel"]
