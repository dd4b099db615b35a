"""Named shapes. Each lists only what differs from EngramConfig's defaults, which are `nano`'s backbone."""

from typing import Any

# The paper's table 5. It leaves out widths and ranks: these (12288, 1536; 512, 512) give its numbers of parameters.
PAPER: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 2560,
    "num_hidden_layers": 30,
    "num_streams": 4,
    "num_attention_heads": 32,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 12288,
    "first_k_dense_replace": 1,
    "n_routed_experts": 55,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1536,
    "shared_expert_intermediate_size": 2 * 1536,
    "memory_heads": 8,
    "memory_row_width": 80,
    "tie_word_embeddings": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Tests: well under a second a step on one core.
    "nano": {"memory_layers": [1], "memory_table_sizes": [499, 997]},
    # The demo: minutes on two cores.
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 384,
        "n_routed_experts": 48,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 40,
        "router_bias_update_rate": 0.01,
        "memory_layers": [1, 2],
        "memory_heads": 4,
        "memory_row_width": 16,
        "memory_table_sizes": [4550, 4550],
    },
    # One GPU, hours: 0.28 B in the backbone, 0.1 B in tables of 3.3 million rows.
    "small": {
        "vocab_size": 32768,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_streams": 4,
        "num_attention_heads": 12,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "intermediate_size": 2048,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "memory_layers": [1, 5],
        "memory_heads": 8,
        "memory_row_width": 32,
        "memory_table_sizes": [102400, 102400],
    },
    "dense-4b": {**PAPER, "first_k_dense_replace": 30},
    "moe-27b": {**PAPER, "n_routed_experts": 72},
    # Layers 2 and 15 in the paper, which counts from one.
    "engram-27b": {**PAPER, "memory_layers": [1, 14], "memory_table_sizes": [2262400, 2262400]},
    "engram-40b": {**PAPER, "memory_layers": [1, 14], "memory_table_sizes": [7239680, 7239680]},
}
