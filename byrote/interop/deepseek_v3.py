"""Weights under the names of DeepseekV3 checkpoints, both ways: what transformers, vLLM and SGLang read.

One table, `places`, says where each released tensor lies in our model, and both directions read it. Released
checkpoints hold one tensor per expert and projection; ours are stacked, the gate's w rows before the up projection's:

    model.layers.L.mlp.experts.E.gate_proj.weight [w, d]  =  layers.L.experts.experts.gate_up[E, :w]

Import also takes the stacked tensors that transformers 5 holds in memory. Modules of multi-token prediction are layers
behind the last (`model.layers.61` of DeepSeek-V3), with copies of embedding and head: we write these, and refuse to
read others than the main model's. If the first of these layers is not there, as in what transformers writes, the model
gets none, whatever its config says; what lies behind the modules of the config is ignored, as are stored rotary
frequencies. Any other name that is not in the table, and any that is missing, is an error. Configs:
byrote/interop/deepseek_v3_config.py.

Left out: fp8 weights with block scales (convert them first), downloads, tokenizers (copy the files).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DeepseekV3Config, GenerationConfig

from byrote.interop.deepseek_v3_config import from_deepseek_v3_config, to_deepseek_v3_config
from byrote.interop.shards import read_names, read_shards, write_shards
from byrote.models.engram import EngramConfig, EngramForCausalLM
from byrote.tables.files.headers import parse_object

ATTENTION = {
    "q_proj": "q_proj",
    "q_a_proj": "q_a_proj",
    "q_a_layernorm": "q_a_norm",
    "q_b_proj": "q_b_proj",
    "kv_a_proj_with_mqa": "kv_a_proj",
    "kv_a_layernorm": "kv_a_norm",
    "kv_b_proj": "kv_b_proj",
    "o_proj": "o_proj",
}
MODULE = {"enorm": "embed_norm", "hnorm": "hidden_norm", "eh_proj": "project", "shared_head.norm": "norm"}
COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
MEMORY = re.compile(r"model\.memories\.|model\.layers\.\d+\.memory\.")
IGNORED = re.compile(r".*rotary_emb\.inv_freq$|model\.layers\.(\d+)\.")


class Place(NamedTuple):
    """Where a released tensor lies in our state dict: the whole of `name`, or some rows of one expert."""

    name: str
    expert: int | None = None
    rows: slice = slice(None)

    def of(self, tensor: Tensor) -> Tensor:
        """The view of our tensor that the released one is."""
        return tensor if self.expert is None else tensor[self.expert, self.rows]


def places(config: EngramConfig) -> dict[str, Place]:
    """Released name -> place, for every tensor of a backbone with this config."""
    found = {"model.embed_tokens.weight": Place("model.embed_tokens.weight")}
    for theirs, ours, layer in _blocks(config):
        found[f"{theirs}input_layernorm.weight"] = Place(f"{ours}attention_norm.weight")
        for name, our_name in ATTENTION.items():
            if name.startswith("q_") and (name == "q_proj") != (config.q_lora_rank is None):
                continue
            found[f"{theirs}self_attn.{name}.weight"] = Place(f"{ours}attention.{our_name}.weight")
        found[f"{theirs}post_attention_layernorm.weight"] = Place(f"{ours}experts_norm.weight")
        if _is_dense(config, layer):
            found |= _mlp(f"{theirs}mlp.", f"{ours}experts.")
        else:
            found |= _experts(config, f"{theirs}mlp.", f"{ours}experts.")
    for k in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + k}."
        found |= {f"{prefix}{name}.weight": Place(f"model.mtp.{k}.{ours}.weight") for name, ours in MODULE.items()}
    found["model.norm.weight"] = Place("model.norm.weight")
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = Place("lm_head.weight")
    return found


def _blocks(config: EngramConfig) -> Iterator[tuple[str, str, int]]:
    """(released prefix, our prefix, layer id) of the trunk's blocks and of the prediction modules'."""
    for layer in range(config.num_hidden_layers):
        yield f"model.layers.{layer}.", f"model.layers.{layer}.", layer
    for k in range(config.num_nextn_predict_layers):
        layer = config.num_hidden_layers + k
        yield f"model.layers.{layer}.", f"model.mtp.{k}.block.", layer


def _is_dense(config: EngramConfig, layer: int) -> bool:
    return min(layer, config.num_hidden_layers - 1) < config.first_k_dense_replace


def _copies(config: EngramConfig) -> dict[str, str]:
    """Released names in the prediction modules -> the weight of ours that they are copies of."""
    layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return {f"model.layers.{layer}.{theirs}": ours for layer in layers for theirs, ours in COPIES.items()}


def _mlp(theirs: str, ours: str) -> dict[str, Place]:
    names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    return {theirs + name: Place(ours + name) for name in names}


def _experts(config: EngramConfig, theirs: str, ours: str) -> dict[str, Place]:
    width = config.moe_intermediate_size
    found = {
        f"{theirs}gate.weight": Place(f"{ours}router.weight"),
        f"{theirs}gate.e_score_correction_bias": Place(f"{ours}router.selection_bias"),
    }
    for expert in range(config.n_routed_experts):
        prefix = f"{theirs}experts.{expert}."
        found[f"{prefix}gate_proj.weight"] = Place(f"{ours}experts.gate_up", expert, slice(width))
        found[f"{prefix}up_proj.weight"] = Place(f"{ours}experts.gate_up", expert, slice(width, None))
        found[f"{prefix}down_proj.weight"] = Place(f"{ours}experts.down", expert)
    if config.shared_expert_intermediate_size:
        found |= _mlp(f"{theirs}shared_experts.", f"{ours}shared.")
    return found


def _stacked(config: EngramConfig) -> dict[str, Place]:
    return {
        f"{theirs}mlp.experts.{name}_proj": Place(f"{ours}experts.experts.{name}")
        for theirs, ours, layer in _blocks(config)
        if not _is_dense(config, layer)
        for name in ("gate_up", "down")
    }


def to_deepseek_v3(model: EngramForCausalLM, *, backbone_only: bool = False) -> dict[str, Tensor]:
    """Released name -> view of the model's weights; nothing is copied."""
    to_deepseek_v3_config(model.config, backbone_only=backbone_only)  # refuses what cannot be said
    state, table = model.state_dict(), places(model.config)
    left = set(state) - {place.name for place in table.values()}
    if model.config.tie_word_embeddings:
        left -= {"lm_head.weight"}
    if unknown := sorted(name for name in left if not MEMORY.match(name)):
        raise ValueError(f"{unknown[0]} and {len(unknown) - 1} more have no name in a DeepSeek-V3 checkpoint")
    tensors = {name: place.of(state[place.name]) for name, place in table.items()}
    return tensors | {theirs: state[ours] for theirs, ours in _copies(model.config).items()}


@torch.no_grad()
def from_deepseek_v3(model: EngramForCausalLM, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy released tensors into the model, one after the other, in any order; ValueError unless all are there."""
    state, table = model.state_dict(), places(model.config)
    known = table | _stacked(model.config)
    layers = model.config.num_hidden_layers + model.config.num_nextn_predict_layers
    filled = dict.fromkeys((place.name for place in table.values()), 0)
    copies = _copies(model.config)
    if model.config.tie_word_embeddings:  # some tied checkpoints store it nevertheless
        copies["lm_head.weight"] = "model.embed_tokens.weight"
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors:
        place = known.get(name)
        if name in copies:
            stored[name] = tensor
        elif place is None:
            found = IGNORED.match(name)
            if not found or (found[1] and int(found[1]) < layers):
                raise ValueError(f"{name} is no tensor of a DeepSeek-V3 checkpoint with this config: check config.json")
        else:
            target = place.of(state[place.name])
            if target.shape != tensor.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, its config says {tuple(target.shape)}: check config.json"
                )
            target.copy_(tensor)
            filled[place.name] += tensor.numel()
    missing = [name for name, place in table.items() if filled[place.name] != state[place.name].numel()]
    if missing:
        found = IGNORED.match(missing[0])
        if found and found[1] and int(found[1]) >= model.config.num_hidden_layers:
            raise ValueError(
                f"{missing[0]} or its neighbors are missing: the prediction modules are not all here, as in what "
                "transformers has in memory; set num_nextn_predict_layers to 0 to import the model without them"
            )
        raise ValueError(f"{missing[0]} or its neighbors are missing ({len(missing)} names): copy all of the shards")
    for name, tensor in stored.items():
        if torch.equal(tensor.to(state[copies[name]]), state[copies[name]]):
            continue
        if name == "lm_head.weight":
            raise ValueError(
                "lm_head.weight is not the embedding, but config.json says tie_word_embeddings: set it to false"
            )
        raise ValueError(
            f"{name} is not {copies[name]}, and byrote's prediction modules share it: set num_nextn_predict_layers "
            "to 0 in config.json to import the model without them"
        )


def save_deepseek_v3(
    model: EngramForCausalLM,
    folder: str | PathLike[str],
    *,
    backbone_only: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that opens as `DeepseekV3ForCausalLM`; the config last: a folder with a config is complete."""
    folder = Path(folder)
    tensors = to_deepseek_v3(model, backbone_only=backbone_only)
    config = to_deepseek_v3_config(model.config, backbone_only=backbone_only)
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.dtype = model.dtype
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(tensors, folder, max_shard_bytes)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    config.save_pretrained(folder)


def load_deepseek_v3(folder: str | PathLike[str], *, dtype: torch.dtype | None = None) -> EngramForCausalLM:
    """The model of a DeepseekV3 folder, without memories. `dtype`: the config's unless given.

    Beside the model no more than one tensor is in memory, and the modules' copies of embedding and head.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no config.json: give the folder of a DeepseekV3 checkpoint")
    path = folder / "config.json"
    model_type = parse_object(path.read_bytes(), str(path)).get("model_type")
    if model_type != "deepseek_v3":
        raise ValueError(f"{model_type=} in {folder}: give the folder of a DeepseekV3 checkpoint")
    theirs = DeepseekV3Config.from_pretrained(folder)
    if not any(name.startswith(f"model.layers.{theirs.num_hidden_layers}.") for name in read_names(folder)):
        theirs.num_nextn_predict_layers = 0
    config = from_deepseek_v3_config(theirs)
    kind = dtype or config.dtype or torch.float32
    assert isinstance(kind, torch.dtype)
    config.dtype = kind
    with torch.device("meta"):
        model = EngramForCausalLM(config)
    model.to(dtype=kind).to_empty(device="cpu")  # type: ignore[call-arg]
    model.tie_weights()
    from_deepseek_v3(model, read_shards(folder))
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()
