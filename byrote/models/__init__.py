"""Hugging Face classes of the model families, registered with the Auto classes: all of them, or none is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from byrote.models.dlcm import DLCMConfig, DLCMForCausalLM, DLCMModel
from byrote.models.engram import EngramConfig, EngramForCausalLM, EngramModel

for _config, _model, _causal_lm in (
    (EngramConfig, EngramModel, EngramForCausalLM),
    (DLCMConfig, DLCMModel, DLCMForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal_lm)

__all__ = ["DLCMConfig", "DLCMForCausalLM", "DLCMModel", "EngramConfig", "EngramForCausalLM", "EngramModel"]
