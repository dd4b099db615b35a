"""Check `engram-forward-golden/1` (docs/formats.md): the Engram layer, its gradients, and the bf16 gate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from byrote.address import AddressSpec, engram, hash_windows, windows
from byrote.lab.conformance.cases import Case, FormatError, check_version, naming_the_file, run_case
from byrote.nn.engram import Engram, Gate

FORMAT = "engram-forward-golden/1"
BF16_ROUNDING = 2**-8  # the most that rounding to bf16 moves a value, relative to it
ROW, STREAM = ("row", "position"), ("row", "position", "stream")
AXES = {
    "mid.embeddings": (*ROW, "component"),
    "mid.keys": (*STREAM, "channel"),
    "mid.gate_logits": STREAM,
    "mid.gates": STREAM,
    "mid.value": (*ROW, "channel"),
    "mid.gated_value": (*STREAM, "channel"),
    "mid.conv_out": (*STREAM, "channel"),
    "output": (*STREAM, "channel"),
    "grad.hidden_states": (*STREAM, "channel"),
    "grad.multi_head_embedding.embedding.weight": ("table row", "component"),
}
GATE_AXES = {
    "mid.raw_dot": ("position", "stream"),
    "mid.rstd_x": ("position", "stream"),
    "mid.rstd_k": ("position", "stream"),
    "mid.gate_score": ("position", "stream"),
    "output": ("position", "stream", "channel"),
    "grad.hidden_states": ("position", "stream", "channel"),
    "grad.k": ("position", "stream", "channel"),
    "grad.v": ("position", "channel"),
    "grad.weight_hidden": ("stream", "channel"),
    "grad.weight_embed": ("stream", "channel"),
}

Tensors = Mapping[str, Tensor]


@naming_the_file
def check_forward_file(path: Path) -> Iterator[Case]:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}") from error
    check_version(header.get("format", ""), FORMAT, header.get("format_version"))
    try:
        configs = json.loads(header["cases"])
    except (KeyError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} has no JSON object `cases` in its metadata: {error}") from error
    if not isinstance(configs, dict) or not all(isinstance(config, dict) for config in configs.values()):
        raise FormatError(f"{path}: `cases` is no object of objects")
    for name, config in configs.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        yield run_case(name, partial(_check_gate if "input.k" in own else _check_layer, config, own))


def _check_layer(config: dict[str, Any], tensors: Tensors, case: Case) -> None:
    rows = _check_addresses(config, tensors, case)
    single, double = (_run(config, tensors, rows, dtype) for dtype in (torch.float32, torch.float64))
    for name, got in single.items():
        if name in tensors:
            noise = (got.double() - double[name].double()).abs().amax(-1, keepdim=True)
            axes = AXES.get(name) or tuple(f"axis {i}" for i in range(got.dim()))
            case.close(name, tensors[name], got, axes, noise=4 * noise.numpy())
    for name in sorted(tensors):
        if name.startswith(("mid.", "grad.")) and name not in single and name != "mid.hash_ids":
            case.unchecked.append(f"{name}, which this engine does not compute")


def _check_addresses(config: dict[str, Any], tensors: Tensors, case: Case) -> Tensor:
    """Row ids [B, T, columns] in the concatenated table."""
    identity = re.search(r"identity map of (\d+) tokens", config.get("tokenizer", ""))
    offsets = tensors["state.multi_head_embedding.offsets"]
    if identity is None:
        case.unchecked.append("hash_ids, because the tokenizer is not an identity map")
        return tensors["mid.hash_ids"] + offsets
    spec = engram(
        np.arange(int(identity.group(1))),
        table_sizes=config["engram_vocab_size"],
        heads=config["n_head_per_ngram"],
        layer_ids=config["layer_ids"],
        pad_id=config["pad_id"],
        seed=config["seed"],
    )
    layer = spec.layer(config["layer_id"])
    where = f"layer {layer.layer_id}"
    if "multipliers" in config:
        case.exact(f"{where} multipliers", config["multipliers"], layer.multipliers, ("place",))
    if "primes" in config:
        case.exact(f"{where} primes", config["primes"], layer.primes, ("order index", "head"))
    case.exact(f"{where} offsets", offsets, layer.offsets, ("column",))
    ids = tensors["input.input_ids"]
    rows = _rows(ids, spec, config["layer_id"])
    if "mid.hash_ids" in tensors:
        hashes = rows - torch.tensor(layer.offsets)
        case.exact(f"{where} hash_ids", tensors["mid.hash_ids"], hashes, (*ROW, "column"))
    return rows


def _rows(ids: Tensor, spec: AddressSpec, layer_id: int) -> Tensor:
    seen = windows(ids, torch.zeros_like(ids, dtype=torch.bool), None, spec.max_order)
    return hash_windows(seen, spec.layer(layer_id), spec.pad_id)


def _run(config: dict[str, Any], tensors: Tensors, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """All quantities of a case, under the names of the file."""
    streams, width = config["hc_mult"], config["hidden_size"]
    state = _by_our_names(tensors, "state", streams)
    table = tensors["state.multi_head_embedding.embedding.weight"].to(dtype, copy=True).requires_grad_()
    hidden = tensors["input.hidden_states"].to(dtype, copy=True).requires_grad_()
    layer = Engram(
        width,
        state["value.weight"].shape[1],
        num_streams=streams,
        kernel_size=state["conv_weight"].shape[-1] if "conv_weight" in state else 0,
        dilation=config.get("dilation", config["max_ngram_size"]),
        bias="value.bias" in state,
        zero_gate_rule=config.get("zero_gate_rule", "sign"),
        eps=_number(config.get("norm_eps_gate"), torch.finfo(torch.float32).eps),
        conv_eps=_number(config.get("norm_eps_conv"), 1e-5),
    )
    layer.load_state_dict(state)
    layer.to(dtype)
    embeddings = table[rows].flatten(2)
    keys = layer.key(embeddings).unflatten(-1, (streams, width))
    output, columns = layer(hidden, embeddings)
    gates, value = layer.gates(hidden, embeddings), layer.value(embeddings)
    found = {
        "mid.embeddings": embeddings,
        "mid.keys": keys,
        "mid.gate_logits": layer.gate.logits(hidden, keys, layer.query_gain, layer.key_gain),
        "mid.gates": gates,
        "mid.value": value,
        "mid.gated_value": gates[..., None] * value[:, :, None],
    }
    if columns is not None:
        found["mid.conv_out"] = layer.convolve(columns.unflatten(-1, (streams, width)), None, None)
    found["output"] = output
    if "cotangent" in tensors:
        (output * tensors["cotangent"]).sum().backward()
        found["grad.hidden_states"] = _gradient(hidden)
        found["grad.multi_head_embedding.embedding.weight"] = _gradient(table)
        ours = {name: _gradient(parameter) for name, parameter in layer.named_parameters()}
        found |= _by_their_names(ours, streams)
    return {name: tensor.detach() for name, tensor in found.items()}


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _by_our_names(tensors: Tensors, group: str, streams: int) -> dict[str, Tensor]:
    """Parameters as `Engram` names and shapes them: the reference has one module per stream."""

    def per_stream(pattern: str) -> Tensor:
        return torch.stack([tensors[f"{group}.{pattern.format(m)}"] for m in range(streams)])

    ours = {
        "key.weight": per_stream("key_projs.{}.weight").flatten(0, 1),
        "value.weight": tensors[f"{group}.value_proj.weight"],
        "key_gain": per_stream("norm1.{}.weight"),
        "query_gain": per_stream("norm2.{}.weight"),
    }
    if f"{group}.value_proj.bias" in tensors:
        ours["key.bias"] = per_stream("key_projs.{}.bias").flatten()
        ours["value.bias"] = tensors[f"{group}.value_proj.bias"]
    if f"{group}.short_conv.conv.weight" in tensors:
        ours["conv_gain"] = per_stream("short_conv.norms.{}.weight")
        ours["conv_weight"] = tensors[f"{group}.short_conv.conv.weight"].squeeze(1).unflatten(0, (streams, -1))
    return ours


def _by_their_names(ours: Tensors, streams: int) -> dict[str, Tensor]:
    """The gradients of `Engram`'s parameters, cut up again into the reference's."""
    theirs = {
        f"grad.value_proj.{kind}": ours[f"value.{kind}"] for kind in ("weight", "bias") if f"value.{kind}" in ours
    }
    pieces = {
        "key_gain": "norm1.{}.weight",
        "query_gain": "norm2.{}.weight",
        "conv_gain": "short_conv.norms.{}.weight",
    }
    for name, pattern in pieces.items():
        if name in ours:
            theirs |= {f"grad.{pattern.format(m)}": ours[name][m] for m in range(streams)}
    for kind in ("weight", "bias"):
        if f"key.{kind}" in ours:
            parts = ours[f"key.{kind}"].chunk(streams)
            theirs |= {f"grad.key_projs.{m}.{kind}": part for m, part in enumerate(parts)}
    if "conv_weight" in ours:
        theirs["grad.short_conv.conv.weight"] = ours["conv_weight"].flatten(0, 1)[:, None]
    return theirs


def _check_gate(config: dict[str, Any], tensors: Tensors, case: Case) -> None:
    """DeepSeek's kernels: bf16 in and out, float32 inside; the output has the residual."""
    single, double = (_run_gate(config, tensors, dtype) for dtype in (torch.float32, torch.float64))
    for name, got in single.items():
        if name in tensors:
            expected = tensors[name].double()
            noise = 4 * (got.double() - double[name]).abs().amax(-1, keepdim=True)
            if tensors[name].dtype == torch.bfloat16:
                noise = noise + BF16_ROUNDING * expected.abs()
            case.close(name, expected, got, GATE_AXES[name], noise=noise.numpy())


def _run_gate(config: dict[str, Any], tensors: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    names = ("hidden_states", "k", "v", "weight_hidden", "weight_embed")
    leaves = {name: tensors[f"input.{name}"].to(dtype, copy=True).requires_grad_() for name in names}
    streams, keys, value, query_gain, key_gain = leaves.values()
    eps = config["eps"]
    gates = Gate(config.get("zero_gate_rule", "sign"), eps)(streams, keys, query_gain, key_gain)
    output = streams + gates[..., None] * value[:, None]
    found = {
        "mid.raw_dot": (streams * query_gain * keys * key_gain).sum(-1),
        "mid.rstd_x": (streams.square().mean(-1) + eps).rsqrt(),
        "mid.rstd_k": (keys.square().mean(-1) + eps).rsqrt(),
        "mid.gate_score": gates,
        "output": output,
    }
    if "cotangent" in tensors:
        (output * tensors["cotangent"]).sum().backward()
        found |= {f"grad.{name}": _gradient(leaf) for name, leaf in leaves.items()}
    return {name: tensor.detach() for name, tensor in found.items()}


def _number(value: Any, default: float) -> float:
    """A number, its text, or one behind the `=` of a note (`finfo(float32).eps = 1.1920929e-07`)."""
    if isinstance(value, str):
        found = re.search(r"(?:^|=)\s*([\d.]+(?:e[-+]?\d+)?)", value)
        if found is None:
            raise ValueError(f"{value!r} holds no number")
        return float(found.group(1))
    return default if value is None else float(value)
