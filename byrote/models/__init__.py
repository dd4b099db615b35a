"""Hugging Face classes of the model families, registered with the Auto classes: all of them, or none is imported."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from byrote.models.classification import (
    DLCMForSequenceClassification,
    DLCMForTokenClassification,
    EngramForSequenceClassification,
    EngramForTokenClassification,
)
from byrote.models.dlcm import DLCMConfig, DLCMForCausalLM, DLCMModel
from byrote.models.engram import EngramConfig, EngramForCausalLM, EngramModel

AUTO = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification)

for _config, *_models in (
    (EngramConfig, EngramModel, EngramForCausalLM, EngramForSequenceClassification, EngramForTokenClassification),
    (DLCMConfig, DLCMModel, DLCMForCausalLM, DLCMForSequenceClassification, DLCMForTokenClassification),
):
    AutoConfig.register(_config.model_type, _config)
    for _auto, _model in zip(AUTO, _models, strict=True):
        _auto.register(_config, _model)

__all__ = [
    "DLCMConfig",
    "DLCMForCausalLM",
    "DLCMForSequenceClassification",
    "DLCMForTokenClassification",
    "DLCMModel",
    "EngramConfig",
    "EngramForCausalLM",
    "EngramForSequenceClassification",
    "EngramForTokenClassification",
    "EngramModel",
]
