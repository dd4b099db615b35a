"""The examples run, and show what they are there to show."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def load(name: str) -> ModuleType:
    [path] = [path for path in EXAMPLES if path.stem == name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_generate_and_look_up(tmp_path, capsys):
    load("train_and_generate").main(str(tmp_path / "model"))
    assert "The capital of Elan lies on the Esk River." in capsys.readouterr().out

    load("look_up").main(str(tmp_path / "model"), "The capital of Elan  elan")
    lines = capsys.readouterr().out.splitlines()
    classes = {line.split()[0]: line.split()[2] for line in lines if line.startswith(" ")}
    assert classes["ĠE"] == classes["e"]  # one class
    trained, unseen = ([float(norm) for norm in lines[i].split()[-4:]] for i in (6, -2))
    assert min(trained) > 0.1 > max(unseen)  # a row of width 8 starts at a norm of about 0.06


def test_trainer_hf(tmp_path, capsys):
    pytest.importorskip("accelerate")
    load("trainer_hf").main(str(tmp_path))
    assert "step 40, table at generation 40" in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_a_screen_and_is_tested(path):
    assert len(path.read_text().splitlines()) <= 60
    assert f'load("{path.stem}")' in Path(__file__).read_text()
