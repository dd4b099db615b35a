"""Every verb: its help fits a screen, it does its work on a run of seconds, and its errors are one clear
line.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import byrote
from byrote.cli.main import app
from byrote.lab.studies import demo
from byrote.models.counts import Counts

VERBS = ["demo", "data", "train", "eval", "plot", "generate", "gates", "info", "conformance", "lab", "table"]
SECOND = [
    "lab run",
    "lab dlcm-scaling",
    "lab mup-check",
    "table stats",
    "table bench",
    "table info",
    "table verify",
    "table convert",
]
WORDS = "the a of in memory model table row token river city north south old new large".split()  # noqa: SIM905
ROOT = Path(__file__).parents[2]


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with texts.jsonl, and with a trained run in run/."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 40)) + f" {i}." for i in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output = run("train", ROOT / "recipes/nano.toml", *settings(folder), "--out", folder / "run")
    assert "validation loss" in output and "bits per byte" in output
    return folder


def settings(folder: Path, **train: object) -> list[str]:
    """Overrides that make a recipe one of seconds."""
    values = {"steps": 6, "batch_size": 4, "warmup": 2, "eval_every": 3, "sample_tokens": 8, **train}
    data = {
        "corpus": f"files:{folder / 'texts.jsonl'}",
        "folder": str(folder / "data"),
        "vocab_size": 280,
        "validation": 0.09,
        "length": 24,
    }
    return [f"train.{key}={value}" for key, value in values.items()] + [f"data.{k}={v}" for k, v in data.items()]


@pytest.mark.parametrize("verb", ["", *VERBS, *SECOND])
def test_help_fits_a_screen(verb):
    output = run(*verb.split(), "--help")
    lines = output.rstrip("\n").split("\n")
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    if not verb:
        assert all(f"\n  {name} " in output for name in VERBS)


def test_data_lists_and_prepares(place, tmp_path):
    listing = run("data")
    assert all(name in listing for name in ("factbook", "prose", "chinese-poetry", "public domain", "GPL"))
    output = run("data", f"files:{place / 'texts.jsonl'}", "--out", tmp_path / "out", "--vocab-size", "280")
    assert "train: 55 documents" in output and "validation: 5 documents" in output
    assert json.loads((tmp_path / "out/meta.json").read_text())["vocab_size"] == 280
    assert "did you mean 'factbook'" in run("data", "factbok", "--out", tmp_path / "x", code=2)


def test_generate_from_a_run_and_from_a_model_folder(place):
    checkpoint = next((place / "run/checkpoints").iterdir())
    greedy = run("generate", place / "run", "the memory", "--greedy", "--max-tokens", "5")
    assert greedy.startswith("the memory")
    assert run("generate", checkpoint, "the memory", "--greedy", "--max-tokens", "5", "--no-stream") == greedy
    spelt = "the <|eos|> of"  # which is text, as it was in training
    assert run("generate", checkpoint, spelt, "--greedy", "--max-tokens", "2").startswith(spelt)
    options = ("--max-tokens", "20", "--temperature", "2.0", "--seed")
    cached = ("--placement", "file", "--cache", "64KB")
    for places, told in (
        (cached, r"; \d+% of the rows were in the cache, [\d,]+ bytes came from files"),
        (cached[:2], ""),
    ):
        output = run("generate", checkpoint, "the memory", "--greedy", "--max-tokens", "5", *places)
        assert output.startswith(greedy)
        assert re.fullmatch(rf"tables: reads took \d\.\d+ s, \d+% of it hidden{told}\n", output[len(greedy) :])
    first, again, other = (run("generate", checkpoint, "the", *options, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_gates_and_info(place, tmp_path):
    output = run("gates", place / "run", "the memory model", "--html", tmp_path / "gates.html")
    assert "layer 1" in output and "<html" in (tmp_path / "gates.html").read_text()
    output = run("info", place / "run", "--config")
    for part in (
        "attention",
        "routed experts",
        "layer 1",
        "digest",
        "step-000006",
        "generation",
        '"hidden_size": 64',
    ):
        assert part in output, part
    assert "hidden_size" not in run("info", place / "run")


def test_generate_with_drafts(place, tmp_path):
    out = tmp_path / "run"
    run("train", ROOT / "recipes/nano.toml", *settings(place), "model.num_nextn_predict_layers=2", "--out", out)
    plain = run("generate", out, "the memory", "--greedy", "--max-tokens", "30")
    for stream in ("--stream", "--no-stream"):
        drafted = run("generate", out, "the memory", "--greedy", "--max-tokens", "30", "--draft", "mtp", stream)
        text, line = drafted.rstrip("\n").rsplit("\n", 1)
        assert text == plain.rstrip("\n") and "drafts" not in plain
        found = re.fullmatch(
            r"drafts: (\d+) of (\d+) accepted \(\d+%\), ([\d.]+) tokens a forward, [\d.]+ tokens/s", line
        )
        assert found and int(found[1]) <= int(found[2]) and 1 <= float(found[3]) <= 3
    sampled = [run("generate", out, "the", "--draft", "mtp", "--seed", seed).splitlines()[0] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    output = " ".join(run("info", out).split())
    assert "apart: multi-token prediction" in output and "in prediction modules, apart" in output
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(("mtp_loss" in record) == ("loss" in record) for record in records)
    assert "recipes/tiny-mtp.toml" in run("generate", place / "run", "x", "--draft", "mtp", code=2)
    assert "prediction" not in run("info", place / "run")


def test_eval_gives_the_loss_of_any_checkpoint(place, tmp_path):
    run_folder = place / "run"
    done = json.loads((run_folder / "result.json").read_text())
    for folder in (run_folder, run_folder / "checkpoints/step-000006"):
        output = run("eval", folder, "--json", tmp_path / "deep/eval.json")
        assert f"validation loss {done['val_loss']:.4f}, {done['bits_per_byte']:.4f} bits per byte" in output
        found = json.loads((tmp_path / "deep/eval.json").read_text())
        assert (found["checkpoint"], found["loss"]) == ("step-000006", done["val_loss"])
    assert "holds no checkpoint 'step-3'; it holds step-000006" in run(
        "eval", run_folder, "--checkpoint", "step-3", code=2
    )
    assert "holds no checkpoint yet" in run("eval", tmp_path, code=2)


def test_eval_says_when_the_text_is_another(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "data", tmp_path / "data")
    recipe = json.loads((tmp_path / "run/recipe.json").read_text())
    recipe["data"]["folder"] = str(tmp_path / "data")
    (tmp_path / "run/recipe.json").write_text(json.dumps(recipe))
    assert "is not the text" not in run("eval", tmp_path / "run")
    tokens = np.load(tmp_path / "data/train.tokens.npy")
    tokens[[5, 6]] = tokens[[6, 5]]
    np.save(tmp_path / "data/train.tokens.npy", tokens)
    assert "is not the text that the run was trained on" in run("eval", tmp_path / "run").replace("\n", " ")


def test_two_runs_in_one_picture(place, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(place / "run", other, ignore=shutil.ignore_patterns("checkpoints"))
    output = run("plot", place / "run", other, "--out", tmp_path / "deep/both.png")
    assert output == f"{tmp_path}/deep/both.png\n" and (tmp_path / "deep/both.png").stat().st_size > 10_000
    (tmp_path / "new").mkdir()
    assert "has not begun" in run("plot", place / "run", tmp_path / "new", code=2)


def test_the_version_and_what_is_drawn_from(place):
    assert run("--version") == f"{byrote.__version__}\n"
    words = ("generate", place / "run", "the memory")
    greedy = run(*words, "--greedy", "--max-tokens", "5", "--device", "cpu")
    assert run(*words, "--top-k", "1", "--max-tokens", "5") == greedy
    assert run(*words, "--top-p", "1e-6", "--max-tokens", "5") == greedy
    drawn = {run(*words, "--top-k", "0", "--temperature", "5", "--seed", seed, "--max-tokens", "5") for seed in (1, 2)}
    assert len(drawn) == 2
    for option, value, message in (
        ("--top-k", "-1", "--top-k is -1; it must be at least 1"),
        ("--top-p", "0", "--top-p is 0.0; it must be above 0"),
        ("--top-p", "nan", "--top-p is nan"),
        ("--device", "gpu", "--device is 'gpu', on which torch cannot compute"),
    ):
        assert message in run(*words, option, value, code=2)
    assert "--greedy draws nothing" in run(*words, "--greedy", "--top-k", "3", code=2)


def test_the_line_to_go_on_with_can_be_pasted(place, tmp_path, monkeypatch):
    """A run with blanks, quotes and what rich takes for markup in its folder and its prompt stops and goes on."""
    out = tmp_path / "a run [/x] of :smile: 'mine'"
    settings_ = [*settings(place, max_seconds=1e-9, eval_every=0), "train.prompt=it's [red] 100 $"]
    output = run("train", "nano", *settings_, "--out", out)
    assert "the time budget ended after step 2" in output
    again = shlex.split(output.split("Go on with: ")[1].splitlines()[0])
    assert again == ["byrote", "train", "nano", *settings_, "--out", str(out), "--resume"]
    # As under torchrun: two processes on this machine.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "Go on with: torchrun --nproc-per-node=2 -m byrote train nano " in run(
        "train", "nano", *settings_, "--out", tmp_path / "other"
    )
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert "the time budget ended after step 4" in run(*again[1:])
    done = run(*again[1:])
    assert f"run folder: {out}" in done and (out / "result.json").exists()
    assert "give --resume too" in run("train", "nano", "--checkpoint", "step-000002", code=2)
    assert "the run is done" in run(*again[1:], code=2)


def test_errors_are_one_line_and_status_2(place, tmp_path):
    recipe = ROOT / "recipes/nano.toml"
    assert run("train", recipe, "model.hiden_size=3", code=2).startswith("error: unknown key model.hiden_size: did you")
    assert "holds a run already" in run("train", recipe, *settings(place), "--out", place / "run", code=2)
    assert "neither a run folder nor" in run("info", tmp_path, code=2)
    assert "neither a run folder nor" in run("generate", tmp_path / "none", "x", code=2)
    assert "must be above 0" in run("generate", place / "run", "x", "--temperature", "0", code=2)
    assert "at least 1" in run("generate", place / "run", "x", "--max-tokens", "0", code=2)


def test_ctrl_c_and_resume_from_the_command_line(place, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "byrote", "train", str(ROOT / "recipes/nano.toml")]
    command += [*settings(place, steps=3000, eval_every=0), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for _ in range(600):
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "SIGINT after step" in said and "--resume" in said
    assert len(list((out / "checkpoints").iterdir())) == 1
    resumed = subprocess.Popen([*command, "--resume"], stdout=subprocess.PIPE, text=True, env=environment)
    began = len((out / "metrics.jsonl").read_text().splitlines())
    for _ in range(600):
        if len((out / "metrics.jsonl").read_text().splitlines()) > began:
            break
        time.sleep(0.1)
    resumed.send_signal(signal.SIGTERM)
    said, _ = resumed.communicate(timeout=60)
    assert resumed.returncode == 130 and "SIGTERM after step" in said


def test_demo_writes_what_it_says(place, tmp_path, monkeypatch):
    """The whole of it, on a small text; small models stand in for the recipes' pair."""
    shape = ["preset='nano'", "hidden_size=64", "n_routed_experts=8"]
    for name, model in {
        "moe": ["memory_layers=[]", "shared_expert_intermediate_size=40"],
        "engram": [
            "memory_layers=[1]",
            "n_routed_experts=7",
            "memory_table_sizes=[400, 400]",
            "memory_kernel_size=0",
        ],
    }.items():
        lines = ["[model]", *shape[:-1], *(model if name == "engram" else [*model, shape[-1]])]
        (tmp_path / f"{name}.toml").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(demo, "RECIPES", tmp_path)
    monkeypatch.setattr(demo, "PAIR", {"moe": "moe.toml", "engram": "engram.toml"})
    monkeypatch.setattr(demo, "TOTAL", 0.2)
    monkeypatch.setattr(demo, "ACTIVE", 0.2)
    output = run("demo", *settings(place), "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert list(report) == ["moe", "engram"]
    for part in report.values():
        keys = {
            "val_loss",
            "bits_per_byte",
            "params_total",
            "params_active",
            "tokens",
            "seconds",
            "tokens_per_second",
        }
        assert keys <= part.keys() and all(part[key] > 0 for key in keys)
        assert part["tokens"] == 6 * 4 * 24
    for name in (
        "loss.png",
        "sample.txt",
        "gates.html",
        "gates.json",
        "moe/metrics.jsonl",
        "engram/loss.png",
    ):
        assert (tmp_path / "out" / name).stat().st_size > 0, name
    assert "bits per byte" in output and "most open" in output
    # Once more: what is trained is not trained again; what stopped goes on; what is not the demo's is left alone.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/metrics.jsonl")}
    before = {key: report["engram"][key] for key in ("val_loss", "bits_per_byte", "seconds")}
    (tmp_path / "out/engram/result.json").unlink()
    run("demo", *settings(place), "--out", tmp_path / "out")
    after = json.loads((tmp_path / "out/report.json").read_text())["engram"]
    assert {key: after[key] for key in before} == before
    assert times[tmp_path / "out/moe/metrics.jsonl"] == (tmp_path / "out/moe/metrics.jsonl").stat().st_mtime_ns
    other = run("demo", *settings(place, steps=7), "--out", tmp_path / "out", code=2)
    assert "train.steps was 6 when the run began and is 7" in other
    texts = (place / "texts.jsonl").read_text()
    (place / "texts.jsonl").write_text(texts.replace("memory", "remory"))
    assert "was trained on another text" in run("demo", *settings(place), "--out", tmp_path / "out", code=2)
    (place / "texts.jsonl").write_text(texts)
    (tmp_path / "mine/engram").mkdir(parents=True)
    (tmp_path / "mine/engram/thesis.txt").write_text("years")
    assert "not empty, and no run" in run("demo", *settings(place), "--out", tmp_path / "mine", code=2)
    assert (tmp_path / "mine/engram/thesis.txt").read_text() == "years"
    monkeypatch.setattr(demo, "TOTAL", 1e-9)
    assert "total parameters differ by" in run("demo", *settings(place), "--out", tmp_path / "out", code=2)


def test_demo_recipes_are_one_comparison():
    recipes = {name: demo.Recipe.load(demo.RECIPES / file) for name, file in demo.PAIR.items()}
    assert recipes["moe"].data == recipes["engram"].data and recipes["moe"].train == recipes["engram"].train


def test_sizes_are_compared():
    first = Counts(1000, 500, 0, 0, 0, 1)
    demo.check_sizes({"a": first, "b": Counts(1010, 510, 0, 0, 0, 1)})
    with pytest.raises(ValueError, match=r"total parameters differ by 1\.1%"):
        demo.check_sizes({"a": first, "b": Counts(1011, 500, 0, 0, 0, 1)})
    with pytest.raises(ValueError, match=r"active parameters differ by 2\.2%"):
        demo.check_sizes({"a": first, "b": Counts(1000, 511, 0, 0, 0, 1)})
