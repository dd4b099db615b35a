"""Dynamic large concept models, and the plain Llama that they are compared with; registered with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from byrote.models.dlcm.configuration import DLCMConfig
from byrote.models.dlcm.modeling import DLCMForCausalLM
from byrote.models.dlcm.trunk import DLCMModel

AutoConfig.register("byrote_dlcm", DLCMConfig)
AutoModel.register(DLCMConfig, DLCMModel)
AutoModelForCausalLM.register(DLCMConfig, DLCMForCausalLM)

__all__ = ["DLCMConfig", "DLCMForCausalLM", "DLCMModel"]
