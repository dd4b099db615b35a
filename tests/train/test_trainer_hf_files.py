"""The stock Trainer with tables in files: what a checkpoint points to is there, exactly, while the checkpoint is."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from transformers import trainer as trainer_module

from byrote import EngramForCausalLM
from byrote.tables.log import manifests
from byrote.train import file_tables
from byrote.train.hf_callback import TableCallback
from tests.train.test_trainer_hf import assert_same, make, snapshot, snapshot_weights, trainer

STEPS = 6


class Crash(BaseException):
    pass


class Recorder(TrainerCallback):
    """What the weights, rows and row state were after each step."""

    def __init__(self):
        self.states = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.states[state.global_step] = snapshot(model)


def run(folder: Path, model=None, resume=None, recorder=None, **options) -> EngramForCausalLM:
    model = model or make(seed=9 if resume else 0)
    trained = trainer(model, folder, placement="file", **{"save_strategy": "steps", "save_steps": 1, **options})
    if recorder:
        trained.add_callback(recorder)
    trained.train(resume_from_checkpoint=resume)
    return model


def checkpoints(folder: Path) -> dict[int, Path]:
    return {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*")}


def assert_exact(folder: Path, states) -> None:
    """Every checkpoint opens as what it was saved as, and the logs hold what they need and nothing else."""
    for step, path in checkpoints(folder).items():
        assert not list(path.glob("table-*.safetensors")) and not list(path.glob("row-state-*"))
        for placement in ("host", "file"):
            model = EngramForCausalLM.from_pretrained(path, placement=placement)
            assert_same(snapshot_weights(model), weights(states[step]))
        assert_same(snapshot(model), states[step])  # with row state
    for log in (folder / "tables").glob("layer-*"):
        needed = manifests.needed(log)
        assert {int(path.stem) for path in log.glob("*.log")} == needed.keys()
        pointers = [path / f"table-{log.name[6:]}.json" for path in checkpoints(folder).values()]
        assert manifests.generations(log) == sorted(json.loads(p.read_text())["committed"] for p in pointers)


def weights(state):
    return {name: value for name, value in state.items() if not name.startswith(("exp_", "touches"))}


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> dict:
    """By step, the states of an uninterrupted run in RAM."""
    recorder = Recorder()
    trained = trainer(make(), tmp_path_factory.mktemp("whole"))
    trained.add_callback(recorder)
    trained.train()
    return recorder.states


@pytest.mark.parametrize("explicit", [True, False])
def test_resume_equals_uninterrupted_in_ram(tmp_path, states, explicit):
    assert_same(snapshot(run(tmp_path, save_steps=3)), states[6])
    assert_exact(tmp_path, states)
    if not explicit:
        shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = run(tmp_path, resume=str(tmp_path / "checkpoint-3") if explicit else True)
    assert_same(snapshot(resumed), states[6])
    assert_exact(tmp_path, states)


def test_an_earlier_checkpoint_does_not_harm_a_later_one(tmp_path, states):
    """The run goes on with other rows of the same generations; those that it has not reached again stay."""
    run(tmp_path)
    recorder = Recorder()
    run(tmp_path, resume=str(tmp_path / "checkpoint-2"), recorder=recorder, learning_rate=1.0, seed=7, max_steps=4)
    assert checkpoints(tmp_path).keys() == {1, 2, 3, 4, 5, 6} and recorder.states.keys() == {3, 4}
    assert not torch.equal(recorder.states[4]["rows.1"], states[4]["rows.1"])
    assert_exact(tmp_path, states | recorder.states)


@pytest.mark.parametrize("limit", [1, 2])
def test_save_total_limit(tmp_path, states, limit):
    run(tmp_path, save_total_limit=limit)
    assert checkpoints(tmp_path).keys() == set(range(STEPS - limit + 1, STEPS + 1))
    assert_exact(tmp_path, states)


@pytest.mark.parametrize("limit", [1, 2, None])
def test_the_best_tables_come_back(tmp_path, limit):
    """The rate grows until training diverges, so that the best evaluation is not the last."""
    model, recorder = make(), Recorder()
    trained = trainer(
        model, tmp_path, placement="file", lr=1e-2, lr_scheduler_type="constant", eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        max_steps=4, save_total_limit=limit,
    )  # fmt: skip
    trained.add_callback(recorder)
    trained.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trained.optimizer, lambda s: [1, 1, 300, 300, 300][s])
    trained.train()
    best = int(trained.state.best_model_checkpoint.rsplit("-", 1)[1])
    assert best < 4 and checkpoints(tmp_path).keys() == {1: {best}, 2: {best, 4}, None: {1, 2, 3, 4}}[limit]
    assert_same(snapshot(model), recorder.states[best])
    assert_exact(tmp_path, recorder.states)
    evaluated = {entry["step"]: entry["eval_loss"] for entry in trained.state.log_history if "eval_loss" in entry}
    assert trained.evaluate()["eval_loss"] == pytest.approx(evaluated[best], abs=1e-6)


@pytest.mark.parametrize(("owner", "name"), [(trainer_module, "rotate_checkpoints"), (file_tables, "collect")])
@pytest.mark.parametrize("half_done", [False, True])
def test_a_crash_between_a_save_and_the_end_of_its_rotation(tmp_path, states, monkeypatch, owner, name, half_done):
    real, calls = getattr(owner, name), []

    def crash(*args, **kwargs):
        calls.append(name)
        if len(calls) < 4:
            return real(*args, **kwargs)
        if half_done:
            real(*args, **kwargs)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        with pytest.raises(Crash):
            run(tmp_path, save_total_limit=1)
    gc.collect()  # the model that crashed had the right to write
    assert 4 in checkpoints(tmp_path)
    resumed = run(tmp_path, resume=True, save_total_limit=1)
    assert_same(snapshot(resumed), states[6])
    assert checkpoints(tmp_path).keys() == {6}
    assert_exact(tmp_path, states)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_in_a_save(tmp_path, states, monkeypatch, when):
    from byrote.tables.placements.logged import LoggedTable

    real, calls = LoggedTable.checkpoint, []

    def crash(table, path):
        calls.append(path)
        if len(calls) == 7 and when == "before":  # the first of two tables of checkpoint-4
            raise Crash
        done = real(table, path)
        if len(calls) == 7:
            raise Crash
        return done

    with monkeypatch.context() as patch:
        patch.setattr(LoggedTable, "checkpoint", crash)
        with pytest.raises(Crash):
            run(tmp_path)
    gc.collect()
    assert not (tmp_path / "checkpoint-4/config.json").exists()
    with pytest.raises(ValueError, match="holds no config"):
        EngramForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert_same(snapshot(run(tmp_path, resume=str(tmp_path / "checkpoint-3"))), states[6])
    assert_exact(tmp_path, states)


def test_a_save_elsewhere_stands_alone_and_needs_no_pointer(tmp_path, states):
    model = make()
    trained = trainer(model, tmp_path / "run", placement="file", save_strategy="steps", save_steps=3)
    trained.train()
    for folder in (tmp_path / "run" / "final", tmp_path / "checkpoint-6"):
        trained.save_model(str(folder))
        assert not list(folder.glob("table-*.json"))
    trained.save_model(str(tmp_path / "run/checkpoint-3"))  # over another moment
    shutil.rmtree(tmp_path / "run/tables")
    for folder in (tmp_path / "run" / "final", tmp_path / "checkpoint-6"):
        assert_same(snapshot_weights(EngramForCausalLM.from_pretrained(folder)), weights(states[6]))


def test_what_it_refuses(tmp_path):
    run(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"tables is there already: resume the run, or delete"):
        run(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="holds pointers to tables in files: resume with 'file' as placement"):
        trainer(make(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer(make(), tmp_path / "host", save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(ValueError, match="holds whole tables: resume with 'host' as placement"):
        run(tmp_path / "host", resume=str(tmp_path / "host/checkpoint-1"))
    other = trainer(make(), tmp_path / "other", placement="file")
    dense = [p for name, p in other.model.named_parameters() if not name.endswith("anchor")]
    other.optimizer = torch.optim.AdamW(dense)
    with pytest.raises(ValueError, match="AdamW holds no anchor of a table"):
        other.train()
    with pytest.raises(ValueError, match="placement must be"):
        TableCallback(placement="disk")
