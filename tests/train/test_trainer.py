"""A resumed run is the uninterrupted one; a batch may be split in any way; every option does what it says."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from byrote.cli.main import app
from byrote.data.loader import Loader
from byrote.data.packing import Packer, Tokens
from byrote.data.prepare import prepare
from byrote.models.engram import EngramConfig, EngramForCausalLM
from byrote.train.checkpoint import checkpoints, latest
from byrote.train.evaluate import Validation, evaluate
from byrote.train.metrics import read_metrics
from byrote.train.recipe import Recipe
from byrote.train.run import finish, make_trainer
from byrote.train.trainer import Interrupted, Trainer
from tests.processes import on_ranks

# The number of threads is part of what makes a run bitwise reproducible.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def stopped_at_step_7(rank: int, recipe: str, data: str, folder: str) -> None:
    """A run that gets Ctrl-C in its seventh step."""
    torch.set_num_threads(1)

    def report(record):
        if record["step"] == 6 and "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)

    loaded = Recipe.load(Path(recipe))
    trainer = make_trainer(loaded, Path(folder), Path(data), prepare(loaded.data.options, Path(data)), report=report)
    with pytest.raises(Interrupted, match="SIGINT after step 7"):
        trainer.train()


def whole(rank: int, recipe: str, folder: str) -> None:
    torch.set_num_threads(1)
    app(["train", recipe, "--out", folder], standalone_mode=False)


@pytest.fixture
def train(corpus, make_recipe, tmp_path):
    """train(name, resume, **settings of [train]) -> the trainer, done; the run is in tmp_path / name."""

    def run(name="run", resume=False, **settings) -> Trainer:
        recipe = make_recipe(**settings)
        meta = prepare(recipe.data.options, corpus / "prepared")
        trainer = make_trainer(recipe, tmp_path / name, corpus / "prepared", meta, resume)
        finish(recipe, trainer, trainer.train(), corpus / "prepared")
        return trainer

    return run


def weights(run: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint that holds numbers, but training.pt, which holds wall-clock
    seconds.
    """
    folder = latest(run)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "training.pt"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r.get("loss", r.get("val_loss"))) for r in read_metrics(run / "metrics.jsonl")]


def training_state(run: Path) -> dict:
    return torch.load(latest(run) / "training.pt", weights_only=True)


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


MODULES = {"model": {"num_nextn_predict_layers": 2}, "mtp_weight_at": [0.67]}


@pytest.mark.parametrize("settings", [MODULES, {"optimizer": "muon", "schedule": "wsd"}], ids=["modules", "muon"])
def test_two_runs_are_bitwise_equal_and_a_resumed_one_too(train, tmp_path, settings):
    train("straight", checkpoint_every=5, keep=5, **settings)
    train("again", read_ahead=0, **settings)
    assert weights(tmp_path / "straight") == weights(tmp_path / "again")
    # As if killed after step 7: the checkpoint of step 5 is the newest, metrics go on beyond it.
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed/checkpoints/step-000009")
    torch.manual_seed(1234)
    train("killed", resume=True, checkpoint_every=5, keep=5, **settings)
    assert weights(tmp_path / "straight") == weights(tmp_path / "killed")
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")
    first, second = training_state(tmp_path / "straight"), training_state(tmp_path / "killed")
    for key in ("step", "loader", "optimizer", "schedule"):
        assert equal(first[key], second[key]), key
    assert any("row" in name or "table" in name for name in weights(tmp_path / "straight"))


def test_the_weight_of_the_modules_loss_follows_the_recipe(train, tmp_path, monkeypatch):
    seen, forward = [], EngramForCausalLM.forward

    def spy(self, *args, **kwargs):
        if self.training:
            seen.append(kwargs.get("mtp_loss_weight"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(EngramForCausalLM, "forward", spy)
    train("plain", steps=2)
    assert seen == [None, None]
    seen.clear()
    train("modules", micro_batch_size=4, **MODULES)
    assert seen == [0.3] * 12 + [0.1] * 6
    train("whole", steps=1, **MODULES)
    train("unweighted", steps=1, **MODULES, mtp_weights=[0.0, 0.0])
    parts, whole, unweighted = (
        read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("modules", "whole", "unweighted")
    )
    for key in ("loss", "mtp_loss"):  # both are logged without the weight, and however the batch is split
        assert parts[key] == pytest.approx(whole[key], abs=1e-5) == pytest.approx(unweighted[key], abs=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    assert parts["grad_norm"] != pytest.approx(
        unweighted["grad_norm"], rel=1e-4
    )  # larger or smaller, as the text has it
    assert "mtp_loss" not in read_metrics(tmp_path / "plain/metrics.jsonl")[0]


def test_ctrl_c_saves_and_the_resumed_run_equals_the_uninterrupted_one(train, make_recipe, corpus, tmp_path):
    train("straight")
    make_recipe().save(tmp_path / "recipe.json")
    arguments = (str(tmp_path / "recipe.json"), str(corpus / "prepared"), str(tmp_path / "stopped"))
    on_ranks(stopped_at_step_7, arguments, 1)
    assert latest(tmp_path / "stopped").name == "step-000007"
    train("stopped", resume=True)
    assert weights(tmp_path / "straight") == weights(tmp_path / "stopped")
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")


def test_a_batch_may_be_split_into_micro_batches(corpus, make_recipe, tmp_path):
    # Plain descent: Adam's first step is the sign of a gradient, even of one that is all rounding.
    data = corpus / "prepared"
    trained = {}
    for size in (0, 1, 3):
        recipe = make_recipe(steps=1, micro_batch_size=size, warmup=0, clip=0.0, learning_rate=0.1)
        torch.manual_seed(0)
        model = EngramForCausalLM(EngramConfig.from_preset("nano", vocab_size=280))
        validation = Validation(Tokens.open(data, "validation"), 1000, 8, 24)
        loader = Loader(Packer(Tokens.open(data, "train"), 8, 24, 0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Trainer(recipe.train, model, optimizer, loader, validation, tmp_path / f"run{size}").train()
        [memory] = dict(model.model.memories.items()).values()
        weights = {name: value for name, value in model.state_dict().items() if not name.endswith("identity")}
        trained[size] = {**weights, "rows": memory.table.read(torch.arange(memory.table.num_rows))}
    for size in (1, 3):
        for name, tensor in trained[size].items():
            torch.testing.assert_close(tensor, trained[0][name], atol=1e-6, rtol=0, msg=name)


def test_two_processes_follow_the_single_process(make_recipe, corpus, tmp_path):
    # At 1e-8 Adam makes a step of gradients that are nothing but rounding, and that differs with the split.
    settings = {"steps": 3, "epsilon": 1e-4}
    make_recipe(**settings).save(tmp_path / "recipe.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "byrote"]
    command += ["train", str(tmp_path / "recipe.json"), "--out", tmp_path / "two"]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    on_ranks(whole, (str(tmp_path / "recipe.json"), str(tmp_path / "one")), 1)  # likewise in a process of its own
    for (step, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=2e-6), step
    first, second = (load_file(latest(tmp_path / name) / "model.safetensors") for name in ("one", "two"))
    for name in first:
        if not name.endswith("identity"):  # of rows to the last bit
            torch.testing.assert_close(
                first[name], second[name], atol=1e-6, rtol=0, msg=lambda said, name=name: f"{name}: {said}"
            )


def test_the_run_folder(train, tmp_path):
    train(checkpoint_every=2, keep=3)
    run = tmp_path / "run"
    assert [path.name for path in checkpoints(run)] == ["step-000006", "step-000008", "step-000009"]
    files = {
        "recipe.json",
        "tokenizer",
        "checkpoints",
        "metrics.jsonl",
        "loss.png",
        "sample.txt",
        "result.json",
    }
    assert {path.name for path in run.iterdir()} == files
    records = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in records if "val_loss" in r] == [4, 8, 9]
    assert {"loss", "lr", "grad_norm", "tokens_per_second", "rows_touched"} <= records[0].keys()
    assert records[0]["rows_touched"] > 0 and records[0]["tokens"] == 8 * 24
    assert json.loads((run / "result.json").read_text())["bits_per_byte"] == records[-1]["bits_per_byte"]
    assert (run / "sample.txt").read_text().strip() and (run / "loss.png").stat().st_size > 10_000
    model = AutoModelForCausalLM.from_pretrained(latest(run))
    assert type(model).__name__ == "EngramForCausalLM"


def test_options_that_must_not_change_the_numbers(train, tmp_path):
    train("plain", steps=3)
    train("checkpointed", steps=3, gradient_checkpointing=True)
    for (_, a), (_, b) in zip(losses(tmp_path / "plain"), losses(tmp_path / "checkpointed"), strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_options_that_change_the_numbers(train, tmp_path):
    train("plain", steps=3, device="cpu")
    train("half", steps=3, precision="bfloat16")
    train("free", steps=3, clip=0.0)
    train("soft", steps=3, epsilon=1e-3)
    train("few", steps=4, eval_every=2, eval_batches=1, threads=torch.get_num_threads())
    muon = {"optimizer": "muon", "steps": 3}
    train("muon", **muon)
    train("muon-jordan", muon_coefficients="jordan", **muon)
    train("muon-rate", muon_rate=0.5, **muon)
    last = {name: losses(tmp_path / name)[-1][1] for name in ("plain", "half", "free", "soft")}
    optimizers = ("plain", "muon", "muon-jordan", "muon-rate")
    assert len({losses(tmp_path / name)[-1][1] for name in optimizers}) == len(optimizers)
    assert 0 < abs(last["plain"] - last["half"]) < 0.05
    assert last["plain"] != last["free"] and last["plain"] != last["soft"]
    *parts, full = [r for r in read_metrics(tmp_path / "few/metrics.jsonl") if "val_loss" in r]
    assert [r["step"] for r in parts] == [2] and all(r["bits_per_byte"] is None for r in parts)
    assert full["step"] == 4 and full["bits_per_byte"] > 0


def test_a_time_budget_stops_cleanly_and_resumes(train, tmp_path):
    with pytest.raises(Interrupted, match="the time budget ended after step 2"):
        train(max_seconds=1e-9)
    train(resume=True)
    assert latest(tmp_path / "run").name == "step-000009"


def test_errors(train, tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        train(resume=True)
    train(steps=1)
    with pytest.raises(ValueError, match="holds a run already"):
        train(steps=1)
    with pytest.raises(ValueError, match="the run is done"):
        train(steps=1, resume=True)
    with pytest.raises(ValueError, match=r"train.seed was 0 when the run began and is 1"):
        train(steps=1, resume=True, seed=1)
    with pytest.raises(ValueError, match="gradient is not finite at step"):
        train("wild", learning_rate=1e30, clip=0.0, warmup=0)


def test_any_hugging_face_model_trains(corpus, make_recipe, tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=280, num_key_value_heads=2, **shape))
    recipe = make_recipe(steps=8, learning_rate=1e-2, warmup=0).train
    data = corpus / "prepared"
    validation = Validation(Tokens.open(data, "validation"), 1000, 4, 24)
    loader = Loader(Packer(Tokens.open(data, "train"), 8, 24, 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
    before = evaluate(model, validation).loss
    result = Trainer(recipe, model, optimizer, loader, validation, tmp_path / "run").train()
    assert result.score.loss < before - 0.3


def test_evaluation_is_the_mean_over_documents_read_alone(corpus):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=280, num_key_value_heads=2, **shape))
    data = Tokens.open(corpus / "prepared", "validation")
    # A row that holds all of the text, so that no document is cut.
    score = evaluate(model, Validation(data, 777, 1, len(data)))
    nats = 0.0
    for begin, end in zip(data.offsets[:-1], data.offsets[1:], strict=True):
        ids = torch.from_numpy(data.tokens[begin:end].astype("int64"))[None]
        with torch.no_grad():
            nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert score.tokens == data.predicted and score.loss == pytest.approx(nats / data.predicted, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / 0.6931471805599453 / 777, rel=1e-5)


def test_signals_are_given_back(train):
    before = signal.getsignal(signal.SIGINT)
    train(steps=1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_the_losses_are_those_of_the_cpu(train, tmp_path, precision):
    train("cpu", device="cpu", precision=precision)
    train("gpu", device="cuda", precision=precision)
    for (step, a), (_, b) in zip(losses(tmp_path / "cpu"), losses(tmp_path / "gpu"), strict=True):
        assert a == pytest.approx(b, abs=1e-3 if precision == "float32" else 2e-2), step
