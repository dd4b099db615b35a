"""`byrote table info | verify | convert` on files of seconds."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from byrote import EngramForCausalLM
from byrote.cli.table.convert import Codec
from byrote.tables import RamTable
from byrote.tables.codecs import CODECS
from tests.cli.test_commands import ROOT, WORDS, run, settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run in RAM and one from files."""
    folder = tmp_path_factory.mktemp("tables")
    texts = [" ".join(WORDS[i % 7 :] * 3) + f" {i}." for i in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, placement in (("host", "host"), ("file", "file")):
        arguments = settings(folder, placement=placement)
        run("train", ROOT / "recipes/nano.toml", *arguments, "--out", folder / name)
    return folder


def table_file(folder: Path, codec: str = "fp32") -> Path:
    path = folder / "table-1.safetensors"
    RamTable(5000, 64, digest="d" * 64, codec=codec).save(path)
    return path


def test_info_of_a_file_and_of_folders(trained, tmp_path):
    output = run("table", "info", table_file(tmp_path, "int8"))
    for part in ("5,000 rows of 64 values, int8: 340,000 bytes", "generation 0, digest dddd", "checksums: none"):
        assert part in output
    output = run("table", "info", trained / "host")
    assert output.count("table-") == output.count("generation") >= 1
    assert "a pointer to generation" in run("table", "info", trained / "file")
    assert "rows of" in run("table", "info", next((trained / "file/tables").glob("table-*.safetensors")))
    (tmp_path / "x").mkdir()
    assert "neither a run folder" in run("table", "info", tmp_path / "x", code=2)
    assert "neither a run folder" in run("table", "info", tmp_path / "none", code=2)


def test_info_recognises_released_tables(tmp_path):
    name = "layers.1.engram.embed"
    tensors = {
        f"{name}.weight": torch.zeros(30, 256).to(torch.float8_e4m3fn),
        f"{name}.scale": torch.full((30, 8), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    save_file(tensors, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / "model-00001-of-00001.safetensors"):
        output = run("table", "info", path)
        assert "layers.1.engram.embed.weight" in output and "as released" in output
        assert "30 rows of 256 values, F8_E4M3 with a scale F8_E8M0 for each 32 values: 7,920 bytes" in output
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "holds no table" in run("table", "info", tmp_path / "other.safetensors", code=2)


def test_verify(tmp_path):
    path = table_file(tmp_path)
    assert "--write" in run("table", "verify", path, code=2)
    assert "wrote" in run("table", "verify", path, "--write")
    assert "every block is as it was" in run("table", "verify", path)
    assert "checksums: table-1.safetensors.sums" in run("table", "info", path)
    content = bytearray(path.read_bytes())
    content[1_100_000] ^= 1
    path.write_bytes(content)
    output = run("table", "verify", path, code=1)
    assert re.search(r"block 1, bytes 1,048,576 to 1,280,\d+: rows: rows 4,09\d to 4,999", output)
    assert "1 damaged block; copy it again" in output.replace("\n", " ")
    assert "is there already" in run("table", "verify", path, "--write", code=2).replace("\n", " ")
    content[0] ^= 1
    path.write_bytes(content)
    assert "2 damaged blocks; copy it again" in run("table", "verify", path, code=1).replace("\n", " ")


def test_no_checksums_of_what_info_refuses(tmp_path):
    whole = table_file(tmp_path)
    content = whole.read_bytes()
    for spoiled in (content[:-5], content[:100], b"", content.replace(b"num_rows", b"nun_rows"), b"{}" * 50):
        whole.write_bytes(spoiled)
        assert str(whole) in run("table", "info", whole, code=2)
        assert str(whole) in run("table", "verify", whole, "--write", code=2)
        assert not whole.with_name(f"{whole.name}.sums").exists()
    save_file({"rows": torch.zeros(5000, 64)}, whole)  # as a tool does that drops metadata
    for arguments in (("info", whole), ("verify", whole, "--write")):
        assert "no metadata 'byrote'" in run("table", *arguments, code=2)


def test_convert_a_file(tmp_path):
    path = table_file(tmp_path)
    output = run("table", "convert", path, tmp_path / "small", "--codec", "int8")
    assert "1,280,000 to 340,000 bytes (26.6%)" in output and "1/253 of the largest value of its row" in output
    assert re.search(r"measured: 0\.000\d+, 1?\d\d\.\d% of what its row allows", output)
    opened = RamTable.open(tmp_path / "small", num_rows=5000, width=64, digest="d" * 64)
    assert opened.codec == "int8"
    assert "is there already" in run("table", "convert", path, tmp_path / "small", "--codec", "int4", code=2)
    missing = run("table", "convert", tmp_path / "none", tmp_path / "y", "--codec", "int4", code=2).replace("\n", " ")
    assert "no such file or folder" in missing and "run folder" not in missing
    assert "give a model or run folder" in run(
        "table", "convert", path, tmp_path / "y", "--codec", "int4", "--check", tmp_path, code=2
    )


def test_codecs_that_a_table_is_converted_to():
    assert set(Codec) == set(CODECS) - {"bf16-stochastic"}


@pytest.mark.parametrize("name", ["host", "file"])
def test_convert_a_model_and_measure_its_loss(trained, tmp_path, name):
    output = run(
        "table", "convert", trained / name, tmp_path / "m", "--codec", "fp32", "--check", trained / name
    ).replace("\n", " ")
    found = re.search(r"loss on \d+ tokens: (\d\.\d+) before, (\d\.\d+) after, \+0\.00000 nats a token", output)
    assert found and found[1] == found[2]
    result = json.loads((trained / name / "result.json").read_text())
    assert float(found[1]) == pytest.approx(result["val_loss"], abs=2e-5)
    output = run(
        "table", "convert", trained / name, tmp_path / "n", "--codec", "int4", "--check", trained / name
    ).replace("\n", " ")
    assert "+0.00000" not in output and "after" in output
    for placement in ("host", "file"):
        model = EngramForCausalLM.from_pretrained(tmp_path / "n", placement=placement)
        assert {memory.table.codec for _, memory in model.memory_stack.items()} == {"int4"}
    assert run("generate", tmp_path / "n", "the", "--max-tokens", "3", "--greedy").startswith("the")
    assert "is not empty" in run("table", "convert", trained / name, tmp_path / "n", "--codec", "int8", code=2)
    assert "no recipe.json" in run(
        "table", "convert", trained / name, tmp_path / "o", "--codec", "int8", "--check", tmp_path, code=2
    ).replace("\n", " ")
