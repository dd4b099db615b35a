"""The golden files pass; a changed copy fails and the report names the place; a broken file is an error."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from byrote.cli.main import app
from byrote.lab.conformance.forward import check_forward_file
from byrote.lab.conformance.hash import check_hash_file

GOLDEN = Path(__file__).parents[1] / "golden"
HASH, FORWARD = GOLDEN / "engram_hash_vectors.json", GOLDEN / "engram_forward.safetensors"


def run(*arguments):
    return CliRunner().invoke(app, ["conformance", *map(str, arguments)])


@pytest.fixture(scope="module")
def vectors():
    return json.loads(HASH.read_text(encoding="utf-8"))


@pytest.fixture
def changed_hash(tmp_path, vectors):
    """A copy of the hash file with fewer cases, changed by a function."""

    def write(change, names=("n3_h4",), **sections):
        data = {"format": vectors["format"], "tokenizers": {"ident1000": vectors["tokenizers"]["ident1000"]}}
        data |= {"cases": [case for case in vectors["cases"] if case["name"] in names]} | sections
        data = json.loads(json.dumps(data))
        change(data)
        path = tmp_path / "vectors.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    return write


@pytest.fixture
def changed_forward(tmp_path):
    def write(change):
        tensors = load_file(FORWARD)
        raw = FORWARD.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
        change(tensors, header)
        path = tmp_path / "vectors.safetensors"
        save_file(tensors, path, header)
        return path

    return write


def test_golden_files_pass():
    result = run("--hash", HASH, "--forward", FORWARD)
    last = result.output.splitlines()[-1]
    assert last.endswith(" passed, 0 failed") and int(last.split()[0]) >= 27
    assert result.exit_code == 0


def set_hash(data):
    data["cases"][0]["layers"]["15"]["hashes"][0][2][5] += 1


def set_prime(data):
    data["cases"][0]["layers"]["1"]["primes"][1][2] = 1063


def set_multiplier(data):
    data["cases"][0]["layers"]["1"]["multipliers"][2] -= 2


def set_offset(data):
    data["cases"][0]["layers"]["1"]["offsets"][3] += 1


def set_total(data):
    data["cases"][0]["layers"]["15"]["total_rows"] = 1


def set_compressed(data):
    data["cases"][0]["compressed_ids"][0][1] = 999


def set_classes(data):
    data["cases"][0]["compressed_vocab_size"] = 999


def set_shape(data):
    data["cases"][0]["layers"]["1"]["hashes"].pop()


def set_seed(data):
    data["cases"][0]["layers"]["1"]["rng_seed"] = 7


def set_bound(data):
    data["cases"][0]["multiplier_half_bound"] = 7


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (set_hash, "layer 15 hashes (NumPy) at row 0, position 2, column 5: expected "),
        (set_prime, "layer 1 primes at order index 1, head 2: expected 1063, got 1039"),
        (set_multiplier, "layer 1 multipliers at place 2: expected 3563315849468961, got 3563315849468963"),
        (set_offset, "layer 1 offsets at column 3"),
        (set_total, "layer 15 total_rows: expected 1, got 8612"),
        (set_compressed, "compressed_ids at row 0, position 1: expected 999, got "),
        (set_classes, "compressed_vocab_size: expected 999, got 1000"),
        (set_shape, "layer 1 hashes (NumPy): expected shape ["),
        (set_seed, "layer 1 rng_seed: expected 7, got 10007"),
        (set_bound, "multiplier_half_bound: expected 7, got "),
    ],
)
def test_a_changed_case_fails_and_names_the_place(changed_hash, change, place):
    result = run("--hash", changed_hash(change, ("n3_h4", "n4_h1")))
    assert f"FAIL  n3_h4: {place}" in result.output
    assert "pass  n4_h1" in result.output and result.output.endswith("2 passed, 1 failed\n")
    assert result.exit_code == 1


def test_changed_normalizer_and_tokenizer_fail(vectors, changed_hash):
    def change(data):
        data["normalizer"][3]["normalized"] = "Apple"
        data["tokenizers"]["synthetic"]["tokens"][5]["compressed_id"] = 9

    tokenizers = {"synthetic": vectors["tokenizers"]["synthetic"]}
    path = changed_hash(change, (), normalizer=vectors["normalizer"], tokenizers=tokenizers)
    result = run("--hash", path)
    assert "FAIL  normalizer: pair 3, text 'APPLE': expected 'Apple', got 'apple'" in result.output
    assert "FAIL  tokenizer synthetic: compressed_id at token 5: expected 9, got 3" in result.output
    assert result.exit_code == 1


def test_changed_row_of_a_dead_token_fails(vectors, changed_hash):
    """With the tokenizer's map in the file, as a list, nothing has to be installed."""
    case = json.loads(json.dumps(vectors["v41"][0]))
    case["config"]["engram_compressed_vocab_size"] = 1000
    case |= {"tokenizer": "mine", "input_ids": [[5, 6, 7]], "token_mask": [[True, False, True]]}
    del case["rows_unmasked"]
    case["rows_masked"] = [[[[0] * 24] * 2] * 3]

    def change(data):
        data["tokenizers"] = {"mine": {"lookup": list(range(1000))}}

    result = run("--hash", changed_hash(change, (), v41=[case]))
    assert "FAIL  v41_dead_tokens: layer 1 rows_masked (NumPy) at row 0, position 0, column 0: expected 0, got" in (
        result.output
    )


def test_what_cannot_be_checked_is_said(changed_hash, vectors):
    """Without its tokenizer a case is checked from its compressed ids on; without those it has failed."""

    def change(data):
        data["tokenizers"] = {"ident1000": {"package": "no-such-tokenizer==9"}}

    output = run("--hash", changed_hash(change)).output
    assert "skip  tokenizer ident1000: nothing to check; not checked: no-such-tokenizer==9 is not" in output
    assert "pass  n3_h4: " in output and "not checked: compressed ids, because the map of" in output
    assert output.endswith("1 passed, 0 failed\n")
    case = vectors["v41"][0]
    output = run("--hash", changed_hash(change, v41=[case | {"tokenizer": "ident1000"}])).output
    assert "skip  v41_dead_tokens: nothing to check" in output and output.endswith("1 passed, 0 failed\n")
    result = run("--hash", changed_hash(change, (), v41=[case | {"tokenizer": "unknown"}]))
    assert "FAIL  v41_dead_tokens: nothing to check" in result.output and result.exit_code == 1


def test_other_names_layers_and_orders(changed_hash):
    """Any subset of the layers, in any order of the file; fields that are not there are not compared."""

    def change(data):
        [case] = data["cases"]
        case["name"], layers = "mine", case["layers"]
        case["layers"] = {"15": layers["15"], "1": {"hashes": layers["1"]["hashes"]}}
        del case["multiplier_half_bound"]
        data["format"], data["format_version"] = "engram-hash-golden", 1

    [_, case] = check_hash_file(changed_hash(change))
    assert case.passed and case.compared == 4 + 7 + 2


@pytest.mark.parametrize(
    "text",
    [
        '{"format": "engram-hash-golden/1", "cases": [{"name": "x"}]}',
        '{"format": "engram-hash-golden/1", "cases": [{"nome": "x"}]}',
        '{"format": "engram-hash-golden/1", "cases": 3}',
        '{"format": "engram-hash-golden/2", "cases": []}',
        '{"format": "engram-hash-golden/1", "format_version": 2}',
        '{"format": "engram-hash-golden/1"}',
        '{"format": "engram-hash-golden/1", "cases": [{"name": "x", "config": {"max_ngram_size": "2"}}]}',
        '{"cases": []}',
        "[]",
        "",
        '{"format": "engram-hash-gol',
    ],
)
def test_a_broken_hash_file_is_an_error(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    result = run("--hash", path)
    assert result.exit_code == 2 and "error: " in result.output and "Traceback" not in result.output


def test_no_file_and_missing_files_are_errors(tmp_path):
    for arguments in ((), ("--hash", tmp_path / "no.json"), ("--forward", tmp_path / "no.safetensors")):
        result = run(*arguments)
        assert result.exit_code == 2 and "error: " in result.output


NAMES = [
    "branch4_n3.output",
    "branch4_n3.mid.embeddings",
    "branch4_n3.mid.keys",
    "branch4_n3.mid.gate_logits",
    "branch4_n3.mid.gates",
    "branch4_n3.mid.value",
    "branch4_n3.mid.gated_value",
    "branch4_n3.mid.conv_out",
    "branch4_n3.grad.hidden_states",
    "branch4_n3.grad.multi_head_embedding.embedding.weight",
    "branch4_n3.grad.key_projs.2.weight",
    "branch4_n3.grad.key_projs.0.bias",
    "branch4_n3.grad.value_proj.weight",
    "branch4_n3.grad.value_proj.bias",
    "branch4_n3.grad.norm1.3.weight",
    "branch4_n3.grad.norm2.0.weight",
    "branch4_n3.grad.short_conv.norms.1.weight",
    "branch4_n3.grad.short_conv.conv.weight",
    "tilekernels_gate_eps1e-20.mid.gate_score",
    "tilekernels_gate_eps1e-20.output",
    "tilekernels_gate_eps1e-20.grad.k",
    "tilekernels_gate_eps1e-20.grad.weight_hidden",
]


@pytest.mark.parametrize("name", NAMES)
def test_one_changed_float_fails_and_names_the_place(changed_forward, name):
    case, _, quantity = name.partition(".")

    def change(tensors, header):
        tensor = tensors[name]
        index = tuple(size - 1 for size in tensor.shape)
        step = 0.02 if tensor.dtype == torch.bfloat16 else 3e-4
        tensor[index] += step * max(1.0, tensor[index].abs().item())
        header["cases"] = json.dumps({case: json.loads(header["cases"])[case]})

    path = changed_forward(change)
    [found] = check_forward_file(path)
    shape = load_file(path)[name].shape
    assert found.failed and found.divergence.startswith(f"{quantity} at ")
    assert f" {shape[-1] - 1}: expected " in found.divergence
    assert not found.divergence.count("differ") or "(1 of " in found.divergence


def test_changed_addresses_of_a_forward_case_fail(changed_forward):
    def change(tensors, header):
        tensors["short_T1.mid.hash_ids"][1, 0, 3] += 1
        tensors["zero_conv.state.multi_head_embedding.offsets"][2] += 1
        configs = json.loads(header["cases"])
        configs["branch1_n2"]["primes"][0][1] = 103
        header["cases"] = json.dumps(configs)

    result = run("--forward", changed_forward(change))
    assert "FAIL  short_T1: layer 1 hash_ids at row 1, position 0, column 3" in result.output
    assert "FAIL  zero_conv: layer 1 offsets at column 2" in result.output
    assert "FAIL  branch1_n2: layer 1 primes at order index 0, head 1: expected 103, got 101" in result.output
    assert result.output.endswith("3 passed, 3 failed\n") and result.exit_code == 1


def test_a_forward_case_without_gradients_convolution_or_biases(changed_forward):
    """DeepSeek-V4.1's shape of the layer: the output is the gated value."""

    def change(tensors, header):
        for name in list(tensors):
            if any(part in name for part in ("short_conv", "bias", "grad.", "cotangent", "mid.keys", "conv_out")):
                del tensors[name]
        config = json.loads(header["cases"])["zero_conv"] | {
            "tokenizer": "some",
            "zero_gate_rule": "copysign",
        }
        for kind in ("value", "gated_value", "gates", "gate_logits"):
            del tensors[f"zero_conv.mid.{kind}"]
        del tensors["zero_conv.output"]
        header["cases"] = json.dumps({"mine": config})
        for name in [name for name in tensors if name.startswith("zero_conv.")]:
            tensors[name.replace("zero_conv", "mine")] = tensors.pop(name)

    [case] = check_forward_file(changed_forward(change))
    assert case.passed and case.compared == 1  # the embeddings
    assert case.unchecked == ["hash_ids, because the tokenizer is not an identity map"]


def test_a_broken_forward_file_is_an_error(tmp_path, changed_forward):
    short = tmp_path / "short.safetensors"
    short.write_bytes(FORWARD.read_bytes()[:1000])
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(FORWARD.read_bytes()[:-100])
    for path in (short, cut):
        assert run("--forward", path).exit_code == 2

    def lose_a_tensor(tensors, header):
        del tensors["branch4_n3.state.value_proj.weight"]

    result = run("--forward", changed_forward(lose_a_tensor))
    assert result.exit_code == 2 and "branch4_n3 lacks 'state.value_proj.weight'" in result.output

    def lose_the_cases(tensors, header):
        del header["cases"]

    result = run("--forward", changed_forward(lose_the_cases))
    assert result.exit_code == 2 and "no JSON object `cases`" in result.output


def test_a_file_of_the_wrong_kind_is_an_error(tmp_path):
    assert run("--forward", HASH).exit_code == 2
    copy = tmp_path / "x.json"
    shutil.copy(FORWARD, copy)
    assert run("--hash", copy).exit_code == 2
