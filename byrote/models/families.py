"""The families of models that byrote has: what a preset's name says of a config and a model."""

from __future__ import annotations

from typing import Any

from byrote.models.dlcm import DLCMConfig, DLCMForCausalLM
from byrote.models.dlcm.presets import PRESETS as DLCM_PRESETS
from byrote.models.engram import EngramConfig, EngramForCausalLM
from byrote.models.engram.presets import PRESETS as ENGRAM_PRESETS

Config = EngramConfig | DLCMConfig
CausalLM = EngramForCausalLM | DLCMForCausalLM

PRESETS = {**ENGRAM_PRESETS, **DLCM_PRESETS}


def config_class(preset: str) -> type[EngramConfig] | type[DLCMConfig]:
    """The config class that has this preset."""
    if preset not in PRESETS:
        raise ValueError(f"model.preset must be one of {sorted(PRESETS)}, got {preset!r}")
    return EngramConfig if preset in ENGRAM_PRESETS else DLCMConfig


def model_class(config: Config) -> Any:
    """The language model that takes this config, and the vocabulary map beside it."""
    return EngramForCausalLM if isinstance(config, EngramConfig) else DLCMForCausalLM
