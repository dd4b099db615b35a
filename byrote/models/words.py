"""Words of configs that are no fields of ours: what they may say, and what is refused, so that none is ignored.

A word that other families have is taken where its value says what our models compute anyway, and refused where it
would change them. Any other word is refused with the nearest field. Of a file, where tools leave notes of their own,
a word that is like no field is kept as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig

# The only values with which these say what is computed here; None says nothing.
SETTLED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "attn_pdrop": (0,),
    "embd_pdrop": (0,),
    "ep_size": (1,),
    "final_logit_softcapping": (),
    "hidden_act": ("silu", "swish"),
    "hidden_dropout": (0,),
    "is_decoder": (False, True),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "output_router_logits": (False,),
    "partial_rotary_factor": (1,),
    "per_layer_config": (),
    "pretraining_tp": (1,),
    "qkv_bias": (False,),
    "resid_pdrop": (0,),
    "rope_interleave": (True,),
    "sliding_window": (),
    "topk_method": ("noaux_tc",),
    "use_sliding_window": (False,),
}
ROPE = ("rope_parameters", "rope_scaling")
# What transformers itself reads or writes, beside the fields that all of its configs have.
OF_TRANSFORMERS = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "finetuning_task",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "prefix",
    "quantization_config",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers_weights",
    "use_return_dict",
}
# What other families call `rms_norm_eps`, of all of their norms.
EPSILONS = ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "post_norm_eps")
# Where the letters do not lead to the field.
MEANT = {
    "aux_loss_alpha": "balance_loss_alpha",
    "d_model": "hidden_size",
    "engram_layer_ids": "memory_layers",
    "hc_mult": "num_streams",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "num_mtp_modules": "num_nextn_predict_layers",
    "router_aux_loss_coef": "balance_loss_alpha",
}


# What is said of generation, in a config of its own.
OF_GENERATION = {name for name in GenerationConfig().to_dict() if name[0] != "_"} - OF_TRANSFORMERS


def is_known(name: str) -> bool:
    """Whether transformers reads this word, or byrote says what it may be."""
    return name.startswith("_") or name in OF_TRANSFORMERS or name in SETTLED or name in ROPE


def nearest(name: str, fields: Iterable[str], cutoff: float = 0.6) -> str | None:
    fields = list(fields)
    if MEANT.get(name) in fields:
        return MEANT[name]
    return next(iter(difflib.get_close_matches(name, fields, 1, cutoff)), None)


def check_word(name: str, value: Any, implied: dict[str, Any], fields: Iterable[str]) -> None:
    """ValueError unless the word says what follows from the fields anyway. `implied`: what follows of some words."""
    if name in implied:
        if value is not None and value != implied[name]:
            raise ValueError(f"{name}={value!r}: it follows from other fields and is {implied[name]!r}; leave it out")
    elif name in SETTLED:
        if value is not None and value not in SETTLED[name]:
            only = " or ".join(map(repr, SETTLED[name])) or "None"
            raise ValueError(f"{name}={value!r}: byrote computes {only} only; leave it out")
    elif name in OF_GENERATION:
        raise ValueError(f"{name}={value!r} is of generation: set it in model.generation_config")
    elif not is_known(name):
        near = nearest(name, fields)
        raise ValueError(
            f"{name}={value!r} is no field of the config: "
            + (f"did you mean {near}?" if near else f"there are {', '.join(fields)}")
        )


def rope_fields(rope: dict[str, Any], longest: int) -> dict[str, Any]:
    """`rope_theta` and `yarn` as transformers' rope parameters say them; ValueError where byrote has no such rotation.

    The temperature of YaRN stands on the softmax scale alone here: so it is where mscale and mscale_all_dim are equal.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or not rope.get("truncate", True):
        raise ValueError(f"rope_parameters={rope}: byrote has neither partial_rotary_factor nor truncate=False")
    found = {} if rope.get("rope_theta") is None else {"rope_theta": float(rope["rope_theta"])}
    if kind == "default":
        return found
    if kind != "yarn":
        raise ValueError(f"rope_type={kind!r}: byrote has 'default' and 'yarn'")
    mscale, everywhere = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    length = rope.get("original_max_position_embeddings")
    if not length:
        raise ValueError(f"rope_parameters={rope}: yarn needs original_max_position_embeddings, the training length")
    stated = rope.get("attention_factor")
    if not (mscale == everywhere != 0 if stated is None else stated == 1.0):
        raise ValueError(
            f"mscale={mscale}, mscale_all_dim={everywhere}, attention_factor={stated}: byrote leaves cos and sin "
            "alone, which needs equal mscales or attention_factor=1; or give yarn=dict(factor=..., original_length=...)"
        )
    yarn = {
        "factor": float(rope.get("factor") or longest / length),
        "original_length": length,
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "mscale": float(everywhere),
    }
    return {**found, "yarn": yarn}
