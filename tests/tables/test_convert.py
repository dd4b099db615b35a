"""Tables in another codec: the same rows as the codec gives, the errors that it states, a piece at a time."""

import pytest
import torch
from safetensors.torch import save_file

from byrote.tables import RamTable
from byrote.tables.codecs import CODECS
from byrote.tables.files import convert as module
from byrote.tables.files.convert import BOUNDS, convert
from byrote.tables.placements.file import FileTable

ROWS, WIDTH, DIGEST = 300, 40, "d" * 64
WANTED = {"num_rows": ROWS, "width": WIDTH, "digest": DIGEST}


@pytest.fixture
def source(tmp_path):
    table = RamTable(ROWS, WIDTH, digest=DIGEST, seed=1, std=0.5)
    table.write(torch.tensor([7]), torch.zeros(1, WIDTH))
    table.generation = 4
    table.save(tmp_path / "source")
    return FileTable.open(tmp_path / "source")


@pytest.mark.parametrize("piece", [1, 4000, 1 << 24])
@pytest.mark.parametrize("codec", CODECS)
def test_rows_and_errors(source, tmp_path, monkeypatch, codec, piece):
    monkeypatch.setattr(module, "PIECE_BYTES", piece)
    seen = []
    done = convert(source, tmp_path / "new/target", codec, lambda at, of: seen.append((at, of)))
    opened = RamTable.open(tmp_path / "new/target", **WANTED)
    values, after = source.read(torch.arange(ROWS)), opened.read(torch.arange(ROWS))
    assert opened.codec == codec and opened.generation == 4 and seen[-1] == (ROWS, ROWS)
    if codec != "bf16-stochastic":
        assert torch.equal(after, CODECS[codec].decode(CODECS[codec].encode(values), WIDTH))
    errors = (after - values).abs()
    assert done.worst == float(errors.max()) and done.rms == pytest.approx(float(errors.norm() / values.norm()), 1e-5)
    shares = (errors.amax(1) / CODECS[codec].bound(values)).nan_to_num(0)
    assert done.share == float(shares.max()) <= 1 and (done.share > 0.3) == (codec != "fp32")
    assert (done.bytes_before, done.bytes_after) == (source.stats()["bytes"], opened.stats()["bytes"])


def test_the_stated_bounds_are_those_of_the_codecs():
    """Of rows whose largest value is 1, in every block."""
    values = torch.ones(1, 64)
    for name, text in BOUNDS.items():
        part = text.split()[0]
        stated = 0.0 if part == "none" else 2.0 ** int(part[2:]) if "^" in part else 1 / float(part[2:])
        assert float(CODECS[name].bound(values)) == pytest.approx(stated, rel=0.01), name
    assert BOUNDS.keys() == CODECS.keys()


def test_what_is_there_is_not_written_over_and_bad_rows_are_named(source, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is there already"):
        convert(source, tmp_path / "source", "int8")
    with pytest.raises(ValueError, match="codec must be one of fp32, bf16"):
        convert(source, tmp_path / "target", "int3")
    values = torch.ones(50, 4)
    values[33, 1] = float("nan")
    save_file({"rows": values}, tmp_path / "released")
    monkeypatch.setattr(module, "PIECE_BYTES", 10 * 16)
    with pytest.raises(ValueError, match="rows 30 to 39: row 3 of the 10 given holds a value that is not finite"):
        convert(FileTable.released(tmp_path / "released", "rows"), tmp_path / "target", "int8")
    assert not (tmp_path / "target").exists()
