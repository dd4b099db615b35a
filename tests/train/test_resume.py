"""A run that stopped, wherever it stopped, goes on; one process at a time; and a run that is done goes on with more."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from byrote.data.prepare import prepare
from byrote.train.checkpoint import checkpoints, latest
from byrote.train.folder import checkpoint_of
from byrote.train.metrics import read_metrics
from byrote.train.run import evaluate_checkpoint, finish, make_trainer
from byrote.train.trainer import Interrupted, Trainer

SETTINGS = {"steps": 6, "eval_every": 0, "checkpoint_every": 2, "keep": 9, "schedule": "constant", "warmup": 2}


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.fixture
def begin(corpus, make_recipe, tmp_path):
    """begin(name, resume, checkpoint, evaluating, **settings of [train]) -> (recipe, trainer); it has not trained."""

    def made(name="run", resume=False, checkpoint="", evaluating=lambda done, total: None, model=None, **settings):
        recipe = make_recipe(model, **{**SETTINGS, **settings})
        data = corpus / "prepared"
        meta = prepare(recipe.data.options, data)
        run = tmp_path / name
        trainer = make_trainer(recipe, run, data, meta, resume, evaluating=evaluating, checkpoint=checkpoint)
        return recipe, trainer

    return made


@pytest.fixture
def train(begin, corpus, monkeypatch):
    """The same, trained and finished, without a picture."""
    monkeypatch.setattr("byrote.train.run.plot_losses", lambda *args: None)

    def trained(*args, **settings) -> Trainer:
        recipe, trainer = begin(*args, **settings)
        finish(recipe, trainer, trainer.train(), corpus / "prepared")
        return trainer

    return trained


def numbers(run: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint but training.pt, which holds seconds, and pointers, which count commits."""
    folder = latest(run)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("training.pt", "table-1.json")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def losses(run: Path) -> list[tuple]:
    return [(r["step"], r.get("loss"), r.get("val_loss")) for r in read_metrics(run / "metrics.jsonl")]


def result(run: Path) -> dict:
    content = json.loads((run / "result.json").read_text())
    del content["seconds"]
    return content


def assert_equal_runs(one: Path, other: Path) -> None:
    assert numbers(one) == numbers(other)
    assert losses(one) == losses(other)
    assert result(one) == result(other)


@pytest.mark.parametrize("placement", ["host", "file"])
def test_a_run_that_ended_before_its_first_checkpoint_starts_again(begin, train, tmp_path, placement):
    _, trainer = begin("run", placement=placement)
    trainer.metrics.write(step=1, loss=99.0)
    trainer.held.close()
    del trainer  # and with it the lock of its tables
    with pytest.raises(ValueError, match="holds a run already; go on with --resume"):
        begin("run", placement=placement)
    train("run", resume=True, placement=placement)
    train("straight", placement=placement)
    assert_equal_runs(tmp_path / "run", tmp_path / "straight")


def test_a_run_that_was_killed_in_its_last_evaluation_goes_on_with_it(begin, train, make_recipe, tmp_path):
    def kill(done, total):
        assert total > 1
        if done == 1:
            raise Killed

    settings = {"checkpoint_every": 0, "eval_every": 3, "eval_batches": 2}
    train("straight", **settings)
    _, trainer = begin("run", **settings)
    trainer.evaluating = lambda done, total: kill(done, total) if trainer.step == 6 else None
    with pytest.raises(Killed):
        trainer.train()
    run = tmp_path / "run"
    assert not (run / "result.json").exists() and latest(run).name == "step-000006"
    train("run", resume=True, **settings)
    assert_equal_runs(run, tmp_path / "straight")
    # Killed a moment later: the evaluation is in the log, and the result is not there.
    (run / "result.json").unlink()
    train("run", resume=True, **settings)
    assert_equal_runs(run, tmp_path / "straight")
    assert [step for step, _, val in losses(run) if val] == [3, 6]  # one validation loss a step

    whole = result(run)
    score = evaluate_checkpoint(make_recipe(**{**SETTINGS, **settings}), latest(run), Console(quiet=True))
    assert (score.loss, score.bits_per_byte) == (whole["val_loss"], whole["bits_per_byte"])


def test_a_signal_stops_the_last_evaluation(begin, train, tmp_path):
    def stop(done, total):
        if done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    _, trainer = begin("run", evaluating=stop)
    with pytest.raises(Interrupted, match=r"SIGTERM after step 6; saved .*step-000006"):
        trainer.train()
    train("run", resume=True)
    assert result(tmp_path / "run")["bits_per_byte"] > 0


def test_a_stop_between_a_step_and_its_evaluation(begin, train, tmp_path):
    train("straight", eval_every=2)
    _, trainer = begin("run", eval_every=2, max_seconds=1e-9)
    with pytest.raises(Interrupted, match="after step 2"):
        trainer.train()
    assert [step for step, _, val in losses(tmp_path / "run") if val] == []
    train("run", resume=True, eval_every=2)
    assert_equal_runs(tmp_path / "run", tmp_path / "straight")


def test_the_time_budget_is_of_one_call(begin, train, tmp_path):
    for resume, step in ((False, 2), (True, 4)):
        _, trainer = begin("run", resume=resume, max_seconds=1e-9)
        with pytest.raises(Interrupted, match=f"the time budget ended after step {step};"):
            trainer.train()
    train("run", resume=True, max_seconds=1e-9)  # its last step: the run is done
    assert result(tmp_path / "run")["tokens"] == 6 * 8 * 24


def test_one_process_writes_to_a_run(begin, train, tmp_path):
    run = tmp_path / "run"
    _, trainer = begin("run")
    for resume in (False, True):
        with pytest.raises(ValueError, match=rf"run is in the hands of process {os.getpid()} on .*: wait for its end"):
            begin("run", resume=resume)
    trainer.train()
    assert not (run / "lock").exists()
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX)\n"
    code += (
        "import os; f.write(f'process {os.getpid()} on mars'); f.flush(); print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(run / "lock")], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"in the hands of process {other.pid} on mars"):
        train("run", resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before
    other.kill()
    other.communicate()
    train("run", resume=True)  # nothing is left to be cleared by hand


@pytest.mark.parametrize("placement", ["host", "file"])
def test_going_on_behind_a_checkpoint_that_is_named(train, tmp_path, placement):
    run = tmp_path / "run"
    train("run", placement=placement)
    shutil.copytree(run, tmp_path / "straight")
    with pytest.raises(
        ValueError, match=r"holds no checkpoint 'step-000003'; it holds step-000002, step-000004, step-0"
    ):
        train("run", resume=True, checkpoint="step-000003", placement=placement)
    train("run", resume=True, checkpoint="step-000002", placement=placement)
    assert [path.name for path in checkpoints(run)] == ["step-000002", "step-000004", "step-000006"]
    assert_equal_runs(run, tmp_path / "straight")
    assert checkpoint_of(run) == latest(run) == checkpoint_of(run, "step-000006")


def test_a_checkpoint_that_is_named_drops_later_ones_at_once(begin, train, tmp_path):
    run = tmp_path / "run"
    train("run")
    _, trainer = begin("run", resume=True, checkpoint="step-000002")
    trainer.held.close()
    assert [path.name for path in checkpoints(run)] == ["step-000002"] and not (run / "result.json").exists()
    assert [step for step, _, _ in losses(run)] == [1, 2]


def test_more_steps_on_a_run_that_is_done(train, tmp_path):
    run = tmp_path / "run"
    train("straight")
    train("run", steps=4)
    with pytest.raises(
        ValueError, match=r"the run is done: .*step-000004 is its last step; to go on, give train.steps"
    ):
        train("run", resume=True, steps=4)
    with pytest.raises(ValueError, match=r"lies beyond train.steps=3"):
        train("run", resume=True, steps=3)
    train("run", resume=True)
    assert json.loads((run / "recipe.json").read_text())["train"]["steps"] == 6
    assert numbers(run) == numbers(tmp_path / "straight") and result(run) == result(tmp_path / "straight")
    assert [step for step, _, val in losses(run) if val] == [4, 6]


def test_more_steps_only_where_the_steps_that_are_done_stay_what_they_are(begin, train, tmp_path):
    train("cosine", schedule="cosine", steps=2)
    with pytest.raises(ValueError, match=r"train.steps was 2 and is 6: by its schedule the rates of the 2 steps"):
        begin("cosine", schedule="cosine", resume=True)
    wsd = {"schedule": "wsd", "decay": 0.5}
    train("wsd", steps=4, **wsd)
    with pytest.raises(ValueError, match=r"train.steps was 4 and is 8"):
        begin("wsd", steps=8, resume=True, **wsd)
    train("wsd", steps=8, resume=True, checkpoint="step-000002", **wsd)
    train("straight", steps=8, **wsd)
    assert_equal_runs(tmp_path / "wsd", tmp_path / "straight")
    # The weight of prediction modules changes at a share of the steps.
    train("modules", steps=4, model={"num_nextn_predict_layers": 1}, mtp_weight_at=[0.5])
    with pytest.raises(ValueError, match=r"train.steps was 4 and is 6"):
        begin("modules", resume=True, model={"num_nextn_predict_layers": 1}, mtp_weight_at=[0.5])


def test_a_log_with_a_torn_line(train, tmp_path):
    run = tmp_path / "run"
    train("straight")
    train("run")
    path = run / "metrics.jsonl"
    shutil.rmtree(latest(run))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    train("run", resume=True)
    assert_equal_runs(run, tmp_path / "straight")
    shutil.rmtree(latest(run))
    lines = whole.split(b"\n")
    path.write_bytes(b"\n".join([lines[0], lines[1][:10], *lines[2:]]))
    with pytest.raises(ValueError, match=r"run/metrics.jsonl, line 2 is no record of a step: remove it"):
        train("run", resume=True)


@pytest.mark.parametrize("line", [b"3", b"[]", b'{"loss": 1.0}', b'{"step": "4"}', b"\xff\xfe", b"\0\0\0", b"{"])
def test_lines_that_are_no_records(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 2.0}'
    for last in (b"", line, b'{"step": 2}'):
        path.write_bytes(b"\n".join([good, last]))
        assert [record["step"] for record in read_metrics(path)] == ([1, 2] if last.endswith(b"2}") else [1])
    for content in (line + b"\n", b"\n".join([good, line, good, b""])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"metrics.jsonl, line {1 + content.startswith(good)} is no record"):
            read_metrics(path)


def test_no_sample_is_asked_for(train, tmp_path):
    train("run", steps=1, sample_tokens=0, prompt="the river")
    assert (tmp_path / "run/sample.txt").read_text() == "the river\n"


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "meta"])
def test_a_device_that_is_not_there_is_refused_first(begin, tmp_path, device):
    with pytest.raises(ValueError, match=f"train.device is '{device}', on which torch cannot compute here"):
        begin("run", device=device)
    assert not (tmp_path / "run").exists()
