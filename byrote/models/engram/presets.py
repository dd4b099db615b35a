"""Named shapes. Each lists only what differs from EngramConfig's defaults, which are `nano`'s backbone."""

from typing import Any

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
}
