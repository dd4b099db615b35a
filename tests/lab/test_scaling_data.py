"""Runs in files: both formats, what may be missing, and errors that name the place and the remedy."""

import json

import numpy as np
import pytest

from byrote.lab.studies.dlcm_scaling.data import read_runs

RUN = {"N": 2e8, "D": 1e10, "R": 4, "P": 0.5, "loss": 3.0}
DECAY = {"N": 2e8, "R": 4, "stable_loss": 3.0, "decayed_loss": 2.9}


def write(folder, records, kind="csv"):
    path = folder / f"runs.{kind}"
    if kind == "json":
        path.write_text(json.dumps(records))
    else:
        names = list(dict.fromkeys(name for record in records for name in record))
        lines = [", ".join(names), *(", ".join(str(record.get(name, "")) for name in names) for record in records)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_both_laws_from_one_file(tmp_path, kind):
    """A run without losses of the one law is left out of that law alone; other columns are left alone."""
    path = write(tmp_path, [RUN | {"note": "a"}, RUN | DECAY | {"loss": 2.5}, DECAY | {"D": 1e10, "P": 0.5}], kind)
    runs, decays = read_runs(path)
    assert runs.loss.tolist() == [3.0, 2.5] and runs.n.tolist() == [2e8, 2e8] and runs.p.dtype == np.float64
    assert decays.stable.tolist() == [3.0, 3.0] and decays.decayed.tolist() == [2.9, 2.9]


def test_one_law_alone(tmp_path):
    assert read_runs(write(tmp_path, [RUN]))[1] is None
    assert read_runs(write(tmp_path, [DECAY]))[0] is None
    assert read_runs(write(tmp_path, [RUN | {"stable_loss": "", "decayed_loss": ""} | {"R": 2}]))[1] is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({k: v for k, v in RUN.items() if k != "P"}, "no column 'P', but N, D, R, loss$"),
        ({("p" if k == "P" else k): v for k, v in RUN.items()}, "no column 'P', but .*; is it 'p'"),
        ({k: v for k, v in RUN.items() if k != "loss"}, "no column 'loss'"),
        ({k: v for k, v in DECAY.items() if k != "stable_loss"}, "no column 'stable_loss'"),
        (RUN | {"D": "many"}, "runs.csv, run 2: D is 'many'; give a number"),
        (RUN | {"loss": "nan"}, "run 2 has loss=nan: leave it out"),
        (RUN | {"loss": "inf"}, "run 2 has loss=inf"),
        (RUN | {"N": 0}, "run 2 has N=0: it must be above 0"),
        (RUN | {"R": 0.5}, "run 2 has R=0.5: a concept has at least 1 token"),
        (RUN | {"P": 1.0}, "run 2 has P=1: it is the share"),
        (RUN | {"P": 1.2}, "run 2 has P=1.2: it is the share"),
        (RUN | {"P": -0.1}, "run 2 has P=-0.1: it must be above 0"),
        (RUN | DECAY | {"decayed_loss": 3.1}, "run 1 has decayed_loss=3.1, not below its stable_loss=3"),
        (RUN | DECAY | {"decayed_loss": ""}, "run 2: decayed_loss is ''; give a number"),
    ],
)
def test_bad_runs(tmp_path, record, message):
    """Behind a good run where the columns allow it, so that the number of the bad one shows."""
    good = [RUN] if set(RUN) <= set(record) else []
    with pytest.raises(ValueError, match=message):
        read_runs(write(tmp_path, [*good, record]))


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_runs(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"read from .csv \(with a header\) or .json"):
        read_runs(tmp_path / "runs.txt")
    with pytest.raises(ValueError, match="holds no run"):
        read_runs(write(tmp_path, [], "json"))
    with pytest.raises(ValueError, match="give a list of objects"):
        read_runs(write(tmp_path, {"N": 1}, "json"))
    with pytest.raises(ValueError, match="has no run with a loss"):
        read_runs(write(tmp_path, [RUN | {"loss": None}], "json"))
    (tmp_path / "bad.json").write_text("[{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_runs(tmp_path / "bad.json")
