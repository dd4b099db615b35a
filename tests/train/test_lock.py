"""A run folder is trained in by one process at a time."""

import subprocess
import sys

import pytest

from byrote.train.run import alone

HOLD = """
import sys
from pathlib import Path
from byrote.tables import disk
lock = disk.lock(Path(sys.argv[1]) / "lock")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_and_a_dead_one_is_not(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="trained by another process"), alone(tmp_path):
            pass
        other.kill()
    with alone(tmp_path), pytest.raises(ValueError, match=str(tmp_path)), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_nothing_is_left_where_nothing_begins(tmp_path):
    for run in (tmp_path / "new", tmp_path / "deeper" / "new"):
        with pytest.raises(ZeroDivisionError), alone(run):
            raise ZeroDivisionError
        assert not run.exists()
    with alone(tmp_path / "new"):
        (tmp_path / "new" / "recipe.json").touch()
    assert (tmp_path / "new" / "recipe.json").exists()
