"""Check `engram-hash-golden/1`: normalizer pairs, tokenizer maps, cases of addresses (docs/formats.md).

Every row id is computed twice, with NumPy and with torch.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from byrote.address import AddressSpec, canonical_ids, deepseek_v41, engram, hash_windows, windows
from byrote.address.contracts.engram import multiplier_half_bound
from byrote.address.vocabulary import compress, compress_texts, normalize, vocabulary_digest
from byrote.lab.conformance.cases import Case, Divergence, FormatError, check_version, naming_the_file, run_case

FORMAT = "engram-hash-golden/1"
PLACE = ("row", "position", "column")

Maps = dict[str, np.ndarray | None]


@naming_the_file
def check_hash_file(path: Path) -> Iterator[Case]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds no JSON object")
    check_version(data.get("format"), FORMAT, data.get("format_version"))
    for section, kind in (("tokenizers", dict), ("normalizer", list), ("cases", list), ("v41", list)):
        if not isinstance(data.get(section, kind()), kind):
            raise FormatError(f"{path}: {section} is not a {kind.__name__}")
    if "normalizer" in data:
        yield run_case("normalizer", partial(_check_normalizer, data["normalizer"]))
    maps: Maps = {}
    for name, entry in data.get("tokenizers", {}).items():
        yield run_case(f"tokenizer {name}", partial(_check_tokenizer, name, entry, maps), optional=True)
    for entry in data.get("cases", []):
        yield run_case(_name(entry), partial(_check_case, entry, maps))
    for entry in data.get("v41", []):
        yield run_case(_name(entry), partial(_check_v41, entry, maps))


def _name(entry: Any) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise FormatError(f"a case has no name: {str(entry)[:80]}")
    return entry["name"]


def _check_normalizer(pairs: list[dict[str, str]], case: Case) -> None:
    for number, pair in enumerate(pairs):
        if (got := normalize(pair["text"])) != pair["normalized"]:
            raise Divergence(f"pair {number}, text {pair['text']!r}: expected {pair['normalized']!r}, got {got!r}")
        case.compared += 1


def _check_tokenizer(name: str, entry: dict[str, Any], maps: Maps, case: Case) -> None:
    vocabulary = maps[name] = _vocabulary(entry)
    if vocabulary is None:
        case.unchecked.append(f"{entry.get('package', 'its package')} is not installed, and no lookup is given")
        return
    for field, expected in (
        ("lookup", entry.get("lookup")),
        ("compressed_id", _listed(entry, "compressed_id")),
    ):
        if expected is not None:
            case.exact(field, expected, vocabulary, ("token",))
    if "len" in entry:
        case.exact("len", entry["len"], len(vocabulary))
    if "samples" in entry:
        raw, expected = np.array(entry["samples"]).reshape(-1, 2).T
        case.exact("samples", expected, vocabulary[raw], ("sample",))
    if "num_compressed" in entry:
        case.exact("num_compressed", entry["num_compressed"], vocabulary.max() + 1)
    if "lookup_sha256" in entry:
        case.exact("lookup_sha256", entry["lookup_sha256"], vocabulary_digest(vocabulary))


def _vocabulary(entry: dict[str, Any]) -> np.ndarray | None:
    """The map of a tokenizer that is listed in the file, installed, or given as a map."""
    texts, raw_tokens = _listed(entry, "text"), _listed(entry, "raw")
    if texts is not None and raw_tokens is not None:
        return compress_texts(texts, raw_tokens)
    if "compressed id = id" in entry.get("rule", ""):
        return np.arange(entry["num_compressed"])
    tokenizer = _installed(entry.get("package", ""))
    if tokenizer is not None:
        return compress(tokenizer)
    return np.array(entry["lookup"], dtype=np.int64) if "lookup" in entry else None


def _listed(entry: dict[str, Any], field: str) -> list[Any] | None:
    if "tokens" not in entry:
        return None
    return [token[field] for token in sorted(entry["tokens"], key=lambda token: token["id"])]


def _installed(requirement: str) -> Tokenizer | None:
    """The tokenizer.json that a Python package NAME==VERSION carries, if that version is installed."""
    package, _, version = requirement.partition("==")
    try:
        found = importlib.metadata.distribution(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    if found.version != version:
        return None
    files = [found.locate_file(file) for file in found.files or [] if file.name == "tokenizer.json"]
    return Tokenizer.from_file(str(files[0])) if files else None


def _check_case(entry: dict[str, Any], maps: Maps, case: Case) -> None:
    config = entry["config"]
    vocabulary = _map_of(entry, maps, case)
    if vocabulary is None:
        # Addresses need no more of the map than its classes and its pad.
        vocabulary, pad_id = np.arange(entry["compressed_vocab_size"]), entry["compressed_pad_id"]
    else:
        pad_id = config["pad_id"]
        raw = np.array(entry["input_ids"])
        # The demo lets negative ids pass; canonical_ids would refuse them.
        compressed = np.where(raw < 0, raw, canonical_ids(vocabulary, raw, raw >= 0))
        case.exact("compressed_vocab_size", entry["compressed_vocab_size"], vocabulary.max() + 1)
        case.exact("compressed_pad_id", entry["compressed_pad_id"], vocabulary[pad_id])
        case.exact("compressed_ids", entry["compressed_ids"], compressed, PLACE[:2])
    spec = engram(
        vocabulary,
        table_sizes=config["engram_vocab_size"],
        heads=config["n_head_per_ngram"],
        layer_ids=config["layer_ids"],
        pad_id=pad_id,
        seed=config["seed"],
    )
    case.exact("max_ngram_size", config["max_ngram_size"], spec.max_order)
    half_bound = multiplier_half_bound(spec.compressed_vocab_size)
    if "multiplier_half_bound" in entry:
        case.exact("multiplier_half_bound", entry["multiplier_half_bound"], half_bound)
    ids = np.array(entry["compressed_ids"])
    for layer_id, expected in entry["layers"].items():
        layer, where = spec.layer(int(layer_id)), f"layer {layer_id}"
        for field, got, axes in (
            ("rng_seed", spec.seed + 10007 * layer.layer_id, ()),
            ("multipliers", layer.multipliers, ("place",)),
            ("primes", layer.primes, ("order index", "head")),
            ("offsets", layer.offsets, ("column",)),
            ("total_rows", layer.rows, ()),
        ):
            if field in expected:
                case.exact(f"{where} {field}", expected[field], got, axes)
        if "hashes" in expected:
            for twin, rows in _rows(ids, spec, layer.layer_id):
                case.exact(f"{where} hashes ({twin})", expected["hashes"], rows - np.array(layer.offsets), PLACE)


def _check_v41(entry: dict[str, Any], maps: Maps, case: Case) -> None:
    config = entry["config"]
    vocabulary = _map_of(entry, maps, case)
    if vocabulary is None:
        case.optional = entry.get("tokenizer") in maps  # its package is not installed, which the file cannot help
        return
    if "engram_compressed_vocab_size" in config:
        case.exact("engram_compressed_vocab_size", config["engram_compressed_vocab_size"], vocabulary.max() + 1)
    spec = deepseek_v41(
        vocabulary,
        table_sizes=[config["engram_vocab_size"]] * (config["engram_max_ngram_size"] - 1),
        heads=config["engram_n_heads"],
        layer_ids=config["engram_layer_ids"],
        pad_id=config["engram_pad_id"],
    )
    if "engram_num_embeddings" in config:
        rows = [layer.rows for layer in spec.layers]
        case.exact("engram_num_embeddings", config["engram_num_embeddings"], rows, ("layer index",))
    raw = np.array(entry["input_ids"])
    for field in ("rows_masked", "rows_unmasked"):
        if field not in entry:
            continue
        alive = np.array(entry["token_mask"], bool) if field == "rows_masked" else np.ones_like(raw, bool)
        ids = canonical_ids(vocabulary, raw, alive)
        expected = np.array(entry[field])
        for index, layer in enumerate(spec.layers):
            for twin, got in _rows(ids, spec, layer.layer_id):
                case.exact(f"layer {layer.layer_id} {field} ({twin})", expected[:, :, index], got, PLACE)


def _map_of(entry: dict[str, Any], maps: Maps, case: Case) -> np.ndarray | None:
    name = entry.get("tokenizer")
    vocabulary = maps.get(name) if name is not None else None
    if vocabulary is None:
        case.unchecked.append(f"compressed ids, because the map of the tokenizer {name} is not at hand")
    return vocabulary


def _rows(ids: np.ndarray, spec: AddressSpec, layer_id: int) -> Iterator[tuple[str, np.ndarray]]:
    """Row ids [B, T, columns] of both twins. No starts: a case's rows are one document each."""
    layer, starts = spec.layer(layer_id), np.zeros(ids.shape, bool)
    yield "NumPy", hash_windows(windows(ids, starts, None, spec.max_order), layer, spec.pad_id)
    seen = windows(torch.from_numpy(ids), torch.from_numpy(starts), None, spec.max_order)
    yield "torch", hash_windows(seen, layer, spec.pad_id).numpy()
