"""The smallest models that have every part, and what transformers' common tests feed them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV3Model, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from byrote import DLCMConfig, DLCMForCausalLM, DLCMModel, EngramConfig, EngramForCausalLM, EngramModel

# The tests look up by these names what a class is for: whether it takes labels, of which shape.
for classes in ((EngramConfig, EngramModel, EngramForCausalLM), (DLCMConfig, DLCMModel, DLCMForCausalLM)):
    config, trunk, head = classes
    modeling_auto.MODEL_MAPPING_NAMES[config.model_type] = trunk.__name__
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = head.__name__


class Subject:
    """What transformers' mixins ask of a `model_tester`: a config, inputs, and the sizes to check outputs by."""

    vocab_size = 99
    batch_size, seq_length = 3, 7
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2
    is_training = True

    def __init__(
        self,
        config_class: type[PreTrainedConfig],
        base_model_class: type[PreTrainedModel],
        causal_lm_class: Any,
        fields: dict[str, Any],
    ) -> None:
        self.config_class, self.base_model_class, self.causal_lm_class = config_class, base_model_class, causal_lm_class
        self.fields = fields

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            **self.fields,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length), generator=generator)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": Subject.num_hidden_layers,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
MEMORY: dict[str, Any] = {"memory_table_sizes": [50, 60], "memory_row_width": 4, "memory_initializer_range": 0.5}
LATENT: dict[str, Any] = {**DEEPSEEK, **MEMORY, "memory_layers": [1], "shared_expert_intermediate_size": 16}
PLAIN: dict[str, Any] = {
    "num_encoder_layers": 1,
    "num_concept_layers": 1,
    "num_decoder_layers": 1,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "concept_size": 32,
    "num_concept_heads": 2,
    "num_concept_key_value_heads": 2,
    "concept_intermediate_size": 32,
}


def engram(**fields: Any) -> Subject:
    return Subject(EngramConfig, EngramModel, EngramForCausalLM, {**LATENT, **fields})


def dlcm(**fields: Any) -> Subject:
    return Subject(DLCMConfig, DLCMModel, DLCMForCausalLM, {**PLAIN, **fields})


def deepseek_v3() -> Subject:
    fields = {"num_key_value_heads": 2, "q_lora_rank": 8, "n_group": 1, "topk_group": 1}
    return Subject(DeepseekV3Config, DeepseekV3Model, DeepseekV3ForCausalLM, {**DEEPSEEK, **fields})
