"""Whatever a user gives a verb: one line that names the file or the option, exit status 2, and no traceback."""

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from byrote import EngramConfig, EngramForCausalLM
from byrote.address import compress
from byrote.cli.main import app
from byrote.data.tokenizer import train_tokenizer
from tests.cli.test_commands import ROOT, WORDS, run, settings

NANO = ROOT / "recipes/nano.toml"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """texts.jsonl; a model with its tokenizer in model/; an empty folder."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 40)) + f" {i}." for i in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = train_tokenizer(texts, 280)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = EngramConfig.from_preset("nano", vocabulary=compress(tokenizer), memory_table_sizes=[101, 103])
    EngramForCausalLM(config, compress(tokenizer)).save_pretrained(folder / "model")
    (folder / "empty").mkdir()
    return folder


def refused(*arguments: object, names: object) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    said = result.output + result.stderr
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, (arguments, said, result.exception)
    assert str(names) in said and "Traceback" not in said, said


READERS = {
    "generate": ("generate", "PATH", "x"),
    "gates": ("gates", "PATH", "x"),
    "concepts": ("concepts", "PATH", "x"),
    "eval": ("eval", "PATH"),
    "plot": ("plot", "PATH"),
    "info": ("info", "PATH"),
    "table info": ("table", "info", "PATH"),
    "table verify": ("table", "verify", "PATH", "--write"),
    "table convert": ("table", "convert", "PATH", "OUT", "--codec", "int8"),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("what", ["nothing", "empty", "texts.jsonl", "texts.jsonl/x"])
def test_what_is_no_model(place, reader, what):
    paths = {"PATH": place / what, "OUT": place / "out"}
    refused(*(paths.get(word, word) for word in reader), names=place / what)
    assert not (place / "out").exists()


def changed(**fields):
    return lambda content: json.dumps({**json.loads(content), **fields}).encode()


DAMAGED = {
    "model.safetensors": [b"", b"garbage" * 9, b"[" * 99, lambda content: content[:-50], None],
    "table-1.safetensors": [b"", b"garbage" * 9, lambda content: content[:-5], None],
    "tokenizer.json": [b"", b"garbage", b"[]", b"{}", b"{"],
    "tokenizer_config.json": [b"{", b"[]"],
    "generation_config.json": [b"[]", b"{", b""],
    "config.json": [
        b"", b"{", b"[]", b"null", b"\xff\xfe{", b"[" * 200_000, b"{}", changed(hidden_size="abc"), changed(address=3),
        changed(hidden_size=None), changed(hidden_size=96), changed(num_attention_heads=0), changed(model_type="none"),
        changed(memory_layers=["a"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_model(place, tmp_path, name):
    for number, content in enumerate(DAMAGED[name]):
        folder = tmp_path / str(number)
        shutil.copytree(place / "model", folder)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content((folder / name).read_bytes()) if callable(content) else content)
        refused("gates", folder, "x", names=folder)
        if name in ("config.json", "model.safetensors"):
            refused("info", folder, names=folder)
        elif name.startswith("tokenizer"):
            assert "parameters" in run("info", folder)  # which needs none
        elif name.startswith("table") and content is not None:
            refused("table", "info", folder, names=folder / name)
            for verb in (("info",), ("verify", "--write")):
                refused("table", *verb, folder / name, names=folder / name)


def test_where_a_page_is_written(place, tmp_path):
    gates = ("gates", place / "model", "x", "--html")
    run(*gates, tmp_path / "new/deep/page.html")
    assert "<html" in (tmp_path / "new/deep/page.html").read_text()
    refused(*gates, "/dev/full", names="/dev/full: No space left on device")
    refused(*gates, tmp_path, names=f"{tmp_path}: Is a directory")
    refused(*gates, place / "texts.jsonl/page.html", names=place / "texts.jsonl")


def test_options_that_cannot_be(place):
    model = place / "model"
    refused("generate", model, "x", "--placement", "file", "--cache", "lots", names="lots")
    refused("generate", model, "\udcff", names="no Unicode text")
    refused("gates", model, "\udcff", names="no Unicode text")
    refused("conformance", names="--hash")
    refused("nosuch", names="nosuch")
    refused("gates", model, "x", "--nosuch", names="--nosuch")


TEXTS = {
    "null.jsonl": b'{"text": null}\n',
    "cut.jsonl": b'{"text": "a"}\n{',
    "wide.txt": "x".encode("utf-16"),
    "latin.txt": b"\xe9",
    "half.jsonl": b'{"text": "\\ud800"}',
}


def test_data_that_is_no_text(place, tmp_path):
    for name, content in TEXTS.items():
        (tmp_path / name).write_bytes(content)
        refused("data", f"files:{tmp_path / name}", "--out", tmp_path / "out", names=tmp_path / name)
    corpus = f"files:{place / 'texts.jsonl'}"
    for out in (place / "texts.jsonl", place / "texts.jsonl/x", Path("/dev/full/x")):
        refused("data", corpus, "--out", out, names=out if out.parent == place else out.parent)
    for tokenizer in (place / "nothing", place / "texts.jsonl", place / "empty"):
        refused("data", corpus, "--out", tmp_path / "out", "--tokenizer", tokenizer, names=tokenizer)
    for name in ("[/x]", "files::smile:", "files:[a-z]*.none", "hf::x:", "files:", "files:{x}"):  # said as they are
        refused("data", name, "--out", tmp_path / "out", names=name.removeprefix("files:"))
    refused("data", corpus, "--out", tmp_path / "out", "--validation", "nan", names="nan")
    assert not (tmp_path / "out").exists()


def test_names_are_no_markup(place, tmp_path):
    """Brackets, colons and dollars in names of files are shown as they are, and end no verb at its end."""
    folder = tmp_path / "[_x] [bold] :smile: {y} $z"
    folder.mkdir()
    shutil.copy(place / "texts.jsonl", folder / "[a-z].jsonl")
    output = run("data", f"files:{folder / '[a-z].jsonl'}", "--out", folder / "corpus", "--vocab-size", "280")
    assert str(folder) in output.replace("\n", "")
    arguments = [text for text in settings(folder, steps=2) if "corpus" not in text]
    corpus = f"data.corpus=files:{folder / '[a-z].jsonl'}"
    output = run("train", NANO, *arguments, corpus, "--out", folder / "run [b]")
    assert "run [b]" in output
    assert "[_x] [bold] :smile:" in run("info", folder / "run [b]")


RECIPES = {
    "open.toml": b"[",
    "wide.toml": "a = 1".encode("utf-16"),
    "list.json": b"[]",
    "number.json": b"3",
    "empty.json": b"",
    "deep.json": b"[" * 200_000,
    "section.toml": b"model = 3",
}


def test_recipes_that_are_none(tmp_path):
    for name, content in RECIPES.items():
        (tmp_path / name).write_bytes(content)
        refused("train", tmp_path / name, "model.hidden_size=3", "--out", tmp_path / "out", names=tmp_path / name)
        refused("lab", "run", tmp_path / name, names=tmp_path / name)
    refused("train", tmp_path, names=tmp_path)
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be(place, tmp_path):
    bad = ["betas=[0.9]", "betas=[0.9, 1]", "betas=['a', 'b']", "threads=100000", "device=xyz", "device=meta"]
    bad += [] if torch.cuda.is_available() else ["device=cuda"]
    for setting in bad:
        name = f"train.{setting.partition('=')[0]}"
        refused("train", NANO, *settings(place), f"train.{setting}", "--out", tmp_path / "out", names=name)
    assert not (tmp_path / "out").exists()  # refused before it was begun
    for out in (place / "texts.jsonl", place / "texts.jsonl/x"):
        refused("train", NANO, *settings(place), "--out", out, names=place / "texts.jsonl")


def test_a_full_disk_and_a_damaged_run(place, tmp_path):
    out, arguments = tmp_path / "run", settings(place, steps=2, schedule="constant")
    run("data", f"files:{place / 'texts.jsonl'}", "--out", place / "data", "--vocab-size", "280")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # as a disk does that has no room for more
        refused("train", NANO, *arguments, "--out", out, names=f"{out}/checkpoints/step-000002")
        for limit in (4_000, 400):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            refused("data", f"files:{place / 'texts.jsonl'}", "--out", tmp_path / "data", names=tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    shutil.rmtree(out)
    shutil.copytree(place / "data", tmp_path / "cut")
    (tmp_path / "cut/validation.offsets.npy").write_bytes(b"garbage")
    damaged_text = [*arguments, f"data.folder={tmp_path / 'cut'}"]
    refused("train", NANO, *damaged_text, "--out", out, names=tmp_path / "cut/validation.offsets.npy")
    assert not out.exists()  # refused before it was begun
    run("train", NANO, *arguments, "--out", out)
    [checkpoint] = (out / "checkpoints").iterdir()
    arguments = settings(place, steps=3, schedule="constant")
    for name in ("training.pt", "config.json", "model.safetensors", "row_state/table-1.safetensors"):
        path = checkpoint / name if (checkpoint / name).exists() else next((checkpoint / name).parent.iterdir())
        content = path.read_bytes()
        for damaged in (b"", b"garbage" * 9):
            path.write_bytes(damaged)
            refused("train", NANO, *arguments, "--out", out, "--resume", names=path)
        path.write_bytes(content)
    for name in ("recipe.json", "result.json"):
        (out / name).write_bytes(b"[]")
    refused("train", NANO, *arguments, "--out", out, "--resume", names=out / "recipe.json")
    refused("info", out, names=out / "result.json")


STUDIES = {
    "a.csv": b"",
    "b.csv": b"N\xff",
    "c.json": b"[",
    "d.json": b"[" * 200_000,
    "e.json": b"\xff",
    "f.csv": b"N,D\n1,2,3\n",
}


def test_studies_and_vectors_that_are_none(tmp_path):
    for name, content in STUDIES.items():
        (tmp_path / name).write_bytes(content)
        refused("lab", "dlcm-scaling", tmp_path / name, "--plot", tmp_path / "x.png", names=tmp_path / name)
        refused("conformance", "--hash", tmp_path / name, names=tmp_path / name)
        refused("conformance", "--forward", tmp_path / name, names=tmp_path / name)
    for verb in (("conformance", "--hash"), ("conformance", "--forward"), ("table", "stats"), ("lab", "run")):
        refused(*verb, tmp_path / "none", names=tmp_path / "none")
        refused(*verb, tmp_path, names=tmp_path)
    refused("lab", "mup-check", "--text", tmp_path / "none", names=tmp_path / "none")


def test_a_bug_still_shows_where_it_is(monkeypatch):
    monkeypatch.setattr("byrote.data.corpora.CORPORA", None)
    assert isinstance(CliRunner().invoke(app, ["data"]).exception, AttributeError)
