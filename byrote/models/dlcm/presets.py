"""Named shapes. Each lists only what differs from DLCMConfig's defaults, which are `dlcm-nano`."""

from typing import Any

# The paper's table 3. Head width, grouping in encoder and decoder, and untied embeddings follow from its counts.
PAPER: dict[str, Any] = {
    "vocab_size": 128815,
    "hidden_size": 1536,
    "num_attention_heads": 24,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}

TINY: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}
SMALL: dict[str, Any] = {"vocab_size": 32768, "hidden_size": 768, "num_attention_heads": 12, "head_dim": 64}

PRESETS: dict[str, dict[str, Any]] = {
    "dlcm-nano": {},
    # The comparison on a CPU: a token of either costs the same FLOPs within 1 %, head and attention over 256 too.
    "dlcm-tiny": {
        **TINY,
        "num_encoder_layers": 2,
        "num_concept_layers": 4,
        "num_decoder_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "concept_size": 256,
        "num_concept_heads": 8,
        "num_concept_key_value_heads": 4,
        "concept_intermediate_size": 512,
    },
    "llama-tiny": {
        **TINY,
        "num_encoder_layers": 8,
        "num_concept_layers": 0,
        "num_decoder_layers": 0,
        "num_key_value_heads": 4,
        "intermediate_size": 336,
    },
    # Half the width of the paper's pair and matched as it matched them, by the matrices of the blocks.
    "dlcm-small": {
        **SMALL,
        "num_encoder_layers": 3,
        "num_concept_layers": 6,
        "num_decoder_layers": 3,
        "num_key_value_heads": 6,
        "intermediate_size": 3072,
        "concept_size": 1536,
        "num_concept_heads": 24,
        "num_concept_key_value_heads": 12,
        "concept_intermediate_size": 3072,
    },
    "llama-small": {
        **SMALL,
        "num_encoder_layers": 12,
        "num_concept_layers": 0,
        "num_decoder_layers": 0,
        "num_key_value_heads": 12,
        "intermediate_size": 2048,
    },
    "dlcm-2.3b": {
        **PAPER,
        "num_encoder_layers": 10,
        "num_concept_layers": 16,
        "num_decoder_layers": 6,
        "num_key_value_heads": 12,
        "intermediate_size": 6144,
        "concept_size": 3072,
        "num_concept_heads": 48,
        "num_concept_key_value_heads": 24,
        "concept_intermediate_size": 6144,
    },
    "llama-1.3b": {
        **PAPER,
        "num_encoder_layers": 32,
        "num_concept_layers": 0,
        "num_decoder_layers": 0,
        "num_key_value_heads": 24,
        "intermediate_size": 4096,
    },
}
