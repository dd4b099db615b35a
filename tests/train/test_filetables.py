"""Training with tables in files equals training with tables in RAM to the last bit, whatever kills it."""

import collections
import contextlib
import random
import shutil
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from byrote.data.prepare import prepare
from byrote.models.engram import EngramForCausalLM
from byrote.tables import RamTable
from byrote.tables.log.log import RowLog
from byrote.tables.placements.file import FileTable
from byrote.tables.placements.logged import LoggedTable
from byrote.train import trainer as trainer_module
from byrote.train.checkpoint import checkpoints, latest
from byrote.train.file_tables import tables
from byrote.train.metrics import read_metrics
from byrote.train.recipe import Recipe
from byrote.train.run import finish, make_trainer
from tests.processes import forked

STAGES = ["opening", "training", "saving", "committing", "committed", "collecting"]


def work(recipe: Path, data: Path, run: Path, tell: Connection) -> None:
    """Train `recipe` from where the run folder stands, in a process that may be killed; tell each stage that begins."""

    def watch(owner, name, stage, after):
        real = getattr(owner, name)

        def call(*args, **kwargs):
            tell.send(stage)
            result = real(*args, **kwargs)
            tell.send(after)
            return result

        setattr(owner, name, call)

    watch(trainer_module, "save_checkpoint", "saving", "training")
    watch(RowLog, "commit", "committing", "committed")  # then pointers, the optimizer's state, a rename, a rotation
    watch(RowLog, "collect", "collecting", "committed")
    tell.send("opening")
    options, resumed = Recipe.load(recipe), (run / "checkpoints").exists()
    trainer = make_trainer(options, run, data, prepare(options.data.options, data), resumed)
    if not resumed:
        trainer.save()
    tell.send("training")
    trainer.train()


@pytest.fixture
def train(corpus, make_recipe, tmp_path):
    def run(name, resume=False, **settings):
        recipe = make_recipe(**settings)
        meta = prepare(recipe.data.options, corpus / "prepared")
        trainer = make_trainer(recipe, tmp_path / name, corpus / "prepared", meta, resume)
        finish(recipe, trainer, trainer.train(), corpus / "prepared")
        return trainer.model

    return run


def assert_equal(model, other) -> None:
    """Weights, rows and row state."""
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for (_, a), (_, b) in zip(model.memory_stack.items(), other.memory_stack.items(), strict=True):
        rows = torch.arange(a.table.num_rows)
        assert a.table.generation == b.table.generation and torch.equal(a.table.read(rows), b.table.read(rows))


def test_it_starts_without_the_table_in_memory(train, monkeypatch):
    """Rows are drawn into the file, some at a time: what RAM does not hold can begin to train."""

    def drawn(self):
        raise AssertionError("the whole table was drawn")

    monkeypatch.setattr(RamTable, "rows", property(drawn))
    assert train("file", placement="file").memory_stack.items()[0][1].table.generation > 0


def assert_state_equal(model, other, folder: Path) -> None:
    for (layer, a), (_, b) in zip(model.memory_stack.items(), other.memory_stack.items(), strict=True):
        paths = [folder / f"a{layer}", folder / f"b{layer}"]
        a.table.save_state(paths[0])
        b.table.save_state(paths[1])
        assert paths[0].stat().st_size > 1000
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_it_equals_training_in_ram_and_so_does_a_resumed_run(train, tmp_path):
    host = train("host", checkpoint_every=3)
    file = train("file", checkpoint_every=3, keep=3, placement="file")
    kinds = [{type(table) for table in tables(model).values()} for model in (file, host)]
    assert kinds == [{LoggedTable}, {RamTable}]
    assert_equal(host, file)
    assert_state_equal(host, file, tmp_path)
    folder = latest(tmp_path / "file")
    assert not list(folder.glob("table-*.safetensors")) and not (folder / "row_state").exists()
    for placement in ("host", "file"):
        assert_equal(host, EngramForCausalLM.from_pretrained(folder, placement=placement))
    shutil.copytree(tmp_path / "file", tmp_path / "killed")
    shutil.rmtree(latest(tmp_path / "killed"))
    resumed = train("killed", resume=True, checkpoint_every=3, keep=3, placement="file")
    assert_equal(host, resumed)
    assert_state_equal(host, resumed, tmp_path)


@pytest.mark.parametrize("ahead", [0, 3])
def test_reading_ahead_changes_no_bit(train, tmp_path, monkeypatch, ahead):
    """With every row of the base cold: reads begin early, and the loader warms each batch, or not."""
    monkeypatch.setattr("byrote.tables.files.reads.resident", lambda fd, places, size: not len(places))
    warmed, original = [], FileTable.warm
    monkeypatch.setattr(FileTable, "warm", lambda self, rows: (warmed.append(rows), original(self, rows))[1])
    host = train("host", eval_every=0)
    file = train("file", eval_every=0, placement="file", read_ahead=ahead)
    assert_equal(host, file)
    assert_state_equal(host, file, tmp_path)
    assert (len(warmed) >= 9) is (ahead > 0)
    last = [record for record in read_metrics(tmp_path / "file/metrics.jsonl") if "loss" in record][-1]
    assert last["read_seconds"] > 0 and 0 <= last["reads_hidden"] <= 1


def test_generations_are_those_that_checkpoints_point_to(train, tmp_path):
    model = train("run", checkpoint_every=1, keep=2, placement="file")
    assert len(checkpoints(tmp_path / "run")) == 2
    for table in tables(model).values():
        assert table.log.generations() == [8, 9]
    model.save_pretrained(tmp_path / "whole")  # stands alone
    shutil.rmtree(tmp_path / "run/tables")
    assert_equal(model, EngramForCausalLM.from_pretrained(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"points to the log .* not there"):
        EngramForCausalLM.from_pretrained(latest(tmp_path / "run"))


def killed_in(process: BaseProcess, told: Connection, rng: random.Random, first: bool) -> str:
    """Kill it at a random moment, or a little after a random stage began; the stage that it was in."""
    wanted, count = rng.choice(STAGES[first:]), rng.randrange(1, 12)
    if first or wanted != "opening":  # a run without any checkpoint cannot be resumed
        while told.recv() != "training":
            pass
    if rng.random() < 0.5:
        time.sleep(0.3 * rng.random())
    elif wanted != "opening":
        for _ in range(count):
            while told.recv() != wanted:
                pass
        time.sleep(0.003 * rng.random())
    assert process.is_alive(), "it came to its end before it was killed"
    process.kill()
    process.join()
    stage = wanted
    with contextlib.suppress(EOFError):
        while told.poll():
            stage = told.recv()
    return stage


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_random_moments(train, make_recipe, corpus, tmp_path, monkeypatch, kills):
    settings = {"steps": 12 * kills + 40, "checkpoint_every": 1, "eval_every": 0, "placement": "file", "threads": 1}
    make_recipe(**settings).save(tmp_path / "recipe.json")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rng, stages = random.Random(0), collections.Counter()

    def start() -> tuple[BaseProcess, Connection]:
        told, tell = forked.Pipe(duplex=False)
        process = forked.Process(
            target=work, args=(tmp_path / "recipe.json", corpus / "prepared", tmp_path / "killed", tell)
        )
        process.start()
        tell.close()
        return process, told

    for kill in range(kills):
        stages[killed_in(*start(), rng, kill == 0)] += 1
    print(f"{kills} kills: {dict(stages)}")
    process, told = start()
    with contextlib.suppress(EOFError):
        while told.recv():
            pass
    process.join()
    assert process.exitcode == 0 and (kills < 50 or stages.keys() == set(STAGES))
    straight = train("straight", **{**settings, "placement": "host", "checkpoint_every": 0})
    killed = EngramForCausalLM.from_pretrained(latest(tmp_path / "killed"), placement="file")
    assert_equal(straight, killed)
    assert_state_equal(straight, killed, tmp_path)
