"""`byrote lab dlcm-scaling` on made-up runs: the table, the files, the errors."""

import json

import pytest

from tests.cli.test_commands import run
from tests.lab.test_scaling_data import DECAY, RUN, write
from tests.lab.test_scaling_fit import decays, grid
from tests.lab.test_scaling_law import LAW


@pytest.fixture(scope="module")
def law_file(tmp_path_factory):
    runs, _ = grid(noise=1e-3, lengths=3)
    columns = zip(runs.n, runs.d, runs.r, runs.p, runs.loss, strict=True)
    records = [dict(zip("N D R P loss".split(), map(float, row), strict=True)) for row in columns]  # noqa: SIM905
    return write(tmp_path_factory.mktemp("runs"), records, "json")


def test_the_law(law_file, tmp_path):
    out = ("--plot", tmp_path / "a/fit.png", "--json", tmp_path / "b/fit.json")
    said = run("lab", "dlcm-scaling", law_file, "--fix", "t_token=1e7", "--fix", "t_data=1e9", "--cost", "2e8", *out)
    assert "Eq. 22, 81 runs" in said and "Eq. 23" not in said and "fixed" in said
    content = json.loads((tmp_path / "b/fit.json").read_text())["law"]
    assert content["coefficients"]["t_data"]["value"] == pytest.approx(1e9) and content["cost"] == 2e8
    assert [row["R"] for row in content["best_share"]] == [2, 4, 8] and len(content["residuals"]) == 81
    for row in content["best_share"]:
        assert row["P"] == pytest.approx(LAW.best_share(2e8, row["R"]), abs=0.05)
        assert row["low"] <= row["P"] <= row["high"] and row["inside_of_the_runs"] == (0.3 <= row["P"] <= 0.7)
        assert f"{row['P']:.3f}" in said
    assert (tmp_path / "a/fit.png").stat().st_size > 10_000


def test_the_decay_alone(tmp_path):
    made = decays(noise=0.01)
    columns = zip(made.n, made.r, made.stable, made.decayed, strict=True)
    path = write(tmp_path, [dict(zip(DECAY, map(float, row), strict=True)) for row in columns])
    said = run("lab", "dlcm-scaling", path, "--plot", tmp_path / "fit.png", "--json", tmp_path / "fit.json")
    assert "Eq. 23, 27 runs" in said and "Eq. 22" not in said and (tmp_path / "fit.png").exists()
    assert json.loads((tmp_path / "fit.json").read_text())["decay"]["coefficients"]["b"]["value"] < 0
    assert "--fix and --cost are of Eq. 22" in run("lab", "dlcm-scaling", path, "--cost", "1e8", code=2)


def test_errors(law_file, tmp_path):
    assert "too few for 11 coefficients" in run("lab", "dlcm-scaling", write(tmp_path, [RUN] * 3), code=2)
    assert "write NAME=VALUE" in run("lab", "dlcm-scaling", law_file, "--fix", "alpha", code=2)
    assert "no coefficient 'beta'" in run("lab", "dlcm-scaling", law_file, "--fix", "beta=1", code=2)
    assert "--cost is 0" in run("lab", "dlcm-scaling", law_file, "--cost", "0", code=2)
    assert "there is no file" in run("lab", "dlcm-scaling", tmp_path / "none.csv", code=2)
