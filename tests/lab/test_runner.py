"""`byrote lab run`: what is planned, what is run, stopped, gone on with and refused, and the table."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from byrote.cli.main import app
from byrote.lab.studies.plan import cells, plan, split_values
from byrote.lab.studies.report import markdown, rows
from byrote.lab.studies.runner import Stopped, run_cell, run_lab

NANO = Path(__file__).parents[2] / "recipes/nano.toml"
WORDS = "the a of in memory model table row token river city north south old new large".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """Settings that make nano a recipe of a second; the last is the number of steps."""
    folder = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 40)) + f" {i}." for i in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {"corpus": f"files:{folder}/texts.jsonl", "folder": folder / "data", "vocab_size": 280, "length": 24}
    data["validation"] = 0.09
    train = {"batch_size": 4, "warmup": 2, "eval_every": 0, "log_every": 1, "steps": 6}
    return [f"data.{key}={value}" for key, value in data.items()] + [f"train.{k}={v}" for k, v in train.items()]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_from_the_command_line(settings, tmp_path, monkeypatch):
    """Two recipes, two rates, two seeds, two at a time; then once more, and nothing is run."""
    monkeypatch.chdir(tmp_path)
    sets = [word for setting in [*settings, "train.learning_rate=1e-3,3e-3"] for word in ("--set", setting)]
    command = ["lab", "run", str(NANO), f"backbone={NANO}", *sets, "--seeds", "2", "--jobs", "2", "--name", "x"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    out = tmp_path / "runs/lab/x"
    done = lines(out)
    assert [(line["variant"], line["seed"]) for line in done[:3]] == [
        ("nano train.learning_rate=1e-3", 0),
        ("nano train.learning_rate=1e-3", 1),
        ("nano train.learning_rate=3e-3", 0),
    ]
    assert len(done) == 8 and done[0]["values"] == {"train.learning_rate": "1e-3"}
    assert all(line["tokens"] == 6 * 4 * 24 and line["params_total"] > line["params_active"] > 0 for line in done)
    table = (out / "table.md").read_text()
    assert table in result.output and len(table.splitlines()) == 6
    assert "± " in table and " from nano train.learning_rate=1e-3" in table
    losses = {(line["variant"], line["seed"]): line["val_loss"] for line in done}
    assert len(set(losses.values())) == 4  # seeds and rates differ; the second recipe is the first
    assert not list(out.rglob("checkpoints"))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and table in again.output
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    changed = CliRunner().invoke(app, [*command, "--set", "train.clip=0.5"])
    assert changed.exit_code == 2 and "train.clip was 1.0 when the run began and is 0.5" in changed.output
    assert (out / "table.md").read_text() == table


def test_a_run_that_was_killed_goes_on_from_its_checkpoint(settings, tmp_path):
    """One run of two is killed; the other is done; started again, the first ends as if nothing had been."""
    longer = [*settings[:-1], "train.steps=40", "train.checkpoint_every=10"]
    variants = plan([str(NANO)], [*longer, "model.hidden_size=64,72"])
    victim, other = cells(variants, 1, tmp_path / "lab")

    def kill():
        while not list((victim.folder / "checkpoints").glob("step-*")):
            time.sleep(0.005)
        for path in Path("/proc").glob("[0-9]*/fd/1"):
            if os.path.realpath(path) == str((victim.folder / "log.txt").resolve()):
                os.kill(int(path.parts[2]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    results, failures = run_lab(variants, 1, tmp_path / "lab", jobs=2)
    killer.join()
    assert list(results) == [other.variant.name]
    assert failures == {victim.name: "killed by signal 9; the same command goes on"}
    assert len((tmp_path / "lab/table.md").read_text().splitlines()) == 3
    before = [path.name for path in (victim.folder / "checkpoints").glob("step-*")]
    assert before and "step-000040" not in before
    started = []
    results, failures = run_lab(
        variants, 1, tmp_path / "lab", keep=True, finished=lambda cell, result: started.append(cell.name)
    )
    assert not failures and started == [victim.name, other.name]
    steps = [json.loads(line)["step"] for line in (victim.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 41), 40]
    whole, _ = run_lab(variants[:1], 1, tmp_path / "whole", keep=True)
    name = victim.variant.name
    assert {k: v for k, v in whole[name][0].items() if k != "seconds"} == {
        k: v for k, v in results[name][0].items() if k != "seconds"
    }
    assert list((victim.folder / "checkpoints").glob("step-000040"))  # --keep
    # Killed after its last evaluation: that is made again, and comes to the same.
    (victim.folder / "done.json").unlink()
    run_cell(victim.folder, keep=False)
    assert json.loads((victim.folder / "done.json").read_text()) == results[name][0]


def test_a_loss_of_a_part_of_the_text_is_no_result(settings, tmp_path):
    """A run is killed before its last evaluation; an older version took the last loss that it saw."""
    parts = [setting for setting in settings if not setting.startswith("train.eval_every")]
    parts += ["train.eval_every=2", "train.eval_batches=1", "train.checkpoint_every=3"]
    variants = plan([str(NANO)], parts)
    [cell] = cells(variants, 1, tmp_path)
    whole, _ = run_lab(variants, 1, tmp_path, keep=True)
    log = cell.folder / "metrics.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(r["step"], r["bits_per_byte"] is None) for r in records if "val_loss" in r] == [
        (2, True),
        (4, True),
        (6, False),
    ]
    log.write_text("".join(json.dumps(record) + "\n" for record in records[:-1]))
    part = {**whole[cell.variant.name][0], "val_loss": 9.9, "bits_per_byte": None}
    for old in (None, part):
        (cell.folder / "done.json").unlink()
        if old:
            (cell.folder / "done.json").write_text(json.dumps(old))
        again, failures = run_lab(variants, 1, tmp_path, keep=True)
        assert again == whole and not failures
    assert whole[cell.variant.name][0]["bits_per_byte"] > 0


def test_a_signal_stops_the_lab_and_its_runs_save(settings, tmp_path):
    variants = plan([str(NANO)], [*settings[:-1], "train.steps=100000"])
    [cell] = cells(variants, 1, tmp_path)

    def stop():
        while not (cell.folder / "metrics.jsonl").exists() or not (cell.folder / "metrics.jsonl").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Stopped, match="SIGINT"):
        run_lab(variants, 1, tmp_path)
    stopper.join()
    assert list((cell.folder / "checkpoints").glob("step-*"))


def test_a_run_that_fails_says_why_and_the_others_go_on(settings, tmp_path):
    variants = plan([str(NANO)], [*settings, "train.learning_rate=1e-3,1e30", "train.clip=0"])
    seen = []
    results, failures = run_lab(variants, 1, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert list(results) == ["nano train.learning_rate=1e-3"] and seen[0][1] == 12
    [why] = failures.values()
    assert "the gradient is not finite" in why and "log.txt" in why


def test_controls(settings, tmp_path):
    variants = plan([str(NANO), f"{NANO}@one-row"], settings)
    assert [variant.name for variant in variants] == ["nano", "nano@one-row"]
    results, _ = run_lab(variants, 1, tmp_path)
    assert results["nano"][0]["val_loss"] != results["nano@one-row"][0]["val_loss"]
    assert results["nano"][0]["params_total"] == results["nano@one-row"][0]["params_total"]
    _, failures = run_lab(plan([f"{NANO}@one-row"], [*settings, "model.memory_layers=[]"]), 1, tmp_path / "b")
    assert "one-row needs memories" in failures["nano@one-row seed 0"]


def test_plan(tmp_path):
    variants = plan([f"a={NANO}", f"b={NANO}@one-row"], ["model.memory_layers=[1],[1, 2]", "train.steps=3"])
    assert [(v.model, v.control, v.recipe.model.overrides["memory_layers"]) for v in variants] == [
        ("a", "", [1]),
        ("a", "", [1, 2]),
        ("b", "one-row", [1]),
        ("b", "one-row", [1, 2]),
    ]
    assert all(variant.recipe.train.steps == 3 for variant in variants)
    planned = cells(variants, 2, tmp_path)
    assert [cell.seed for cell in planned] == [0] * 4 + [1] * 4
    assert len({cell.folder for cell in planned}) == 8
    recipe = planned[-1].recipe
    assert (recipe.train.seed, recipe.model.overrides["memory_seed"], recipe.train.threads) == (1, 1, 1)
    [v41] = plan([str(NANO)], ["model.memory_contract=deepseek_v41", "train.threads=2"])
    recipe = cells([v41], 2, tmp_path)[1].recipe
    assert "memory_seed" not in recipe.model.overrides and recipe.train.threads == 2


def test_split_values():
    assert split_values("1,2") == ["1", "2"]
    assert split_values("[1,2],[3]") == ["[1,2]", "[3]"]
    assert split_values("\"a,b\",'c,d',e") == ['"a,b"', "'c,d'", "e"]
    assert split_values("") == [""]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan([str(NANO)], ["train.seed=3"]), "follows from the number of seeds"),
        (lambda: plan([str(NANO)], ["train.steps"]), "sets nothing"),
        (lambda: plan([str(NANO)], ["train.steps=1", "train.steps=2"]), "is set twice"),
        (lambda: plan([f"{NANO}@two-rows"]), "there is no control 'two-rows'; there are one-row"),
        (lambda: cells(plan([str(NANO), str(NANO)]), 1, Path()), "two variants are called 'nano'"),
        (lambda: cells(plan([str(NANO)]), 0, Path()), "seeds is 0"),
        (lambda: run_lab(plan([str(NANO)]), 1, Path(), jobs=0), "jobs is 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_two_preparations_of_one_folder_are_refused(settings, tmp_path):
    others = [setting for setting in settings if not setting.startswith("data.validation")]
    with pytest.raises(ValueError, match=r"data.folder of its own"):
        run_lab(plan([str(NANO)], [*others, "data.validation=0.1,0.2"]), 1, tmp_path)


def test_the_table_by_hand():
    """Differences 1, 2, 3 from the first recipe: mean 2, half 4.303 / sqrt(3). Other data has no baseline."""

    def run(loss):
        return {"val_loss": loss, "bits_per_byte": 1.0, "seconds": 2.0, "params_total": 1000, "params_active": 10}

    variants = plan([f"a={NANO}", f"b={NANO}"])
    results = {
        "a": {0: run(1.0), 1: run(2.0), 2: run(3.0)},
        "b": {2: run(6.0), 0: run(2.0), 1: run(4.0)},
    }
    assert markdown(rows(variants, results), 3).splitlines() == [
        "| model | validation loss | bits per byte | loss minus a | seconds | parameters | active |",
        "|---|---|---|---|---|---|---|",
        "| a | 2.0000 (sd 1.0000) | 1.0000 |  | 2 | 1,000 | 10 |",
        "| b | 4.0000 (sd 2.0000) | 1.0000 | +2.0000 ± 2.4841 | 2 | 1,000 | 10 |",
    ]
    assert "| b (3 of 4 seeds) |" in markdown(rows(variants, results), 4)
    one = markdown(rows(variants, {name: {0: run(loss)} for name, loss in (("a", 1.0), ("b", 3.0))}), 1).splitlines()
    assert one[2].startswith("| a | 1.0000 | 1.0000 |  | 2 |") and one[3].startswith(
        "| b | 3.0000 | 1.0000 | +2.0000 |"
    )
    swept = plan([f"a={NANO}", f"b={NANO}"], ["data.corpus=factbook,prose", "train.steps=1,2"])
    results = {variant.name: {0: run(1.0), 1: run(2.0)} for variant in swept}
    baselines = [row.baseline for row in rows(swept, results)]
    names = [variant.name for variant in swept[:4]]
    assert baselines == ["", names[0], "", names[2], *names]


@pytest.mark.parametrize("line", ['corpus = "prose"', "vocab_size = 2048", 'tokenizer = "elsewhere"', "length = 32"])
def test_losses_of_other_data_are_not_subtracted(tmp_path, line):
    """Recipe b reads other tokens than a: it is no difference from a, and c, which reads b's, is one from b."""
    key = line.split()[0]
    for name in ("b", "c"):
        lines = [text for text in NANO.read_text().splitlines() if not text.startswith(f"{key} ")]
        at = lines.index("[data]") + 1
        (tmp_path / f"{name}.toml").write_text("\n".join([*lines[:at], line, *lines[at:]]))
    content = (tmp_path / "c.toml").read_text().replace('folder = "data/factbook-nano"', 'folder = "data/elsewhere"')
    (tmp_path / "c.toml").write_text(content)
    variants = plan([str(NANO), str(tmp_path / "b.toml"), str(tmp_path / "c.toml")], ["train.steps=1,2"])
    made = {"val_loss": 2.0, "bits_per_byte": 1.0, "seconds": 2.0, "params_total": 1000, "params_active": 10}
    table = rows(variants, {variant.name: {0: made} for variant in variants})
    first, b = variants[0].name, variants[2].name
    assert [row.baseline for row in table] == ["", first, "", b, b, variants[3].name]
    assert "are not compared" in markdown(table, 1) and "are not compared" not in markdown(table[:2], 1)


def test_runs_outlive_no_lab(settings, tmp_path):
    """The lab itself is killed: its run notices, saves and ends, and the next lab can go on with it."""
    sets = [word for setting in [*settings[:-1], "train.steps=100000"] for word in ("--set", setting)]
    command = [sys.executable, "-m", "byrote", "lab", "run", str(NANO), *sets, "--seeds", "1"]
    lab = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cell = tmp_path / "runs/lab/nano/nano/seed-0"
    wait_for(lambda: (cell / "metrics.jsonl").exists() and (cell / "metrics.jsonl").read_text())
    lab.kill()
    lab.wait()
    wait_for(lambda: "SIGTERM after step" in (cell / "log.txt").read_text())
    assert list((cell / "checkpoints").glob("step-*"))


def wait_for(condition, seconds=60):
    for _ in range(seconds * 20):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")
