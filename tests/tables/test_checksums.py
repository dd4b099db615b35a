"""Checksums beside a file: what has changed is found and named by its rows."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from byrote.tables import RamTable
from byrote.tables.files import checksums
from byrote.tables.files.checksums import Damage, sidecar, verify, write_sums
from byrote.tables.files.headers import read_header
from byrote.tables.placements.file import FileTable


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 1000)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "table"
    RamTable(500, 9, digest="d" * 64, codec="int8").save(path)
    write_sums(path)
    return path


def flip(path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 64]))


def test_the_sidecar_is_what_it_says(path):
    content, data = json.loads(sidecar(path).read_text()), path.read_bytes()
    assert (content["format_version"], content["algorithm"], content["file_bytes"]) == (1, "blake2b-16", len(data))
    blocks = [data[at : at + 1000] for at in range(0, len(data), 1000)]
    assert content["blocks"] == [hashlib.blake2b(block, digest_size=16).hexdigest() for block in blocks]
    assert verify(path) == []


@settings(max_examples=30, deadline=None)
@given(where=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4))
def test_changed_blocks_and_their_rows(tmp_path_factory, where):
    path = tmp_path_factory.mktemp("sums") / "table"
    tensors = {"a": torch.zeros(300, 7), "b": torch.zeros(50, 3, 2), "scalar": torch.tensor(1.0)}
    save_file(tensors, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "BLOCK_BYTES", 1000)
        write_sums(path)
    places, size = read_header(path)[0], path.stat().st_size
    header = min(place.start for place in places.values())
    changed = {header + int(share * (size - header)) for share in where}
    for at in changed:
        flip(path, at)
    found = verify(path)
    assert [damage.number for damage in found] == sorted({at // 1000 for at in changed})
    for damage in found:
        expected = {}
        for name, place in places.items():
            rows = place.shape[0] if place.shape else 1
            row = place.num_bytes // rows
            starts = [place.start + i * row for i in range(rows)]
            inside = [i for i, at in enumerate(starts) if at < damage.end and at + row > damage.begin]
            if inside:
                expected[name] = (inside[0], inside[-1])
        assert damage.rows == expected
        assert (damage.begin, damage.end) == (damage.number * 1000, min(size, damage.number * 1000 + 1000))


def test_a_damaged_header(path):
    flip(path, 2)
    assert verify(path) == [Damage(0, 0, 1000, {})]


def test_a_file_cut_or_made_longer(path):
    content, last = path.read_bytes(), (path.stat().st_size - 1) // 1000
    path.write_bytes(content[:3500])
    found = verify(path)
    assert [damage.number for damage in found] == list(range(3, last + 1)) and found[-1].rows["rows"][1] == 499
    path.write_bytes(content + b"x")
    assert [damage.number for damage in verify(path)] == [last]
    flip(path, last * 1000)
    assert [damage.number for damage in verify(path)] == [last]
    path.write_bytes(content)
    assert verify(path) == []


def test_progress(path):
    seen = []
    verify(path, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == -(-path.stat().st_size // 1000)


@pytest.mark.parametrize("place", ["ram", "file"])
def test_a_table_written_again_loses_its_sidecar(path, place):
    table = RamTable.open(path, num_rows=500, width=9, digest="d" * 64) if place == "ram" else FileTable.open(path)
    table.save(path)
    assert not sidecar(path).exists()
    with pytest.raises(ValueError, match="no checksums beside it: byrote table verify --write"):
        verify(path)


BAD_SIDECARS = {
    "no JSON": ("{", "is damaged"),
    "no blocks": ('{"format_version": 1, "algorithm": "blake2b-16", "file_bytes": 1, "block_bytes": 1}', "is damaged"),
    "another number": (
        '{"format_version": 1, "algorithm": "blake2b-16", "file_bytes": 9, "block_bytes": 5, "blocks": [""]}',
        "1 blocks of 5 bytes are no file of 9",
    ),
    "too deep": ("[" * 200_000, "is damaged"),
    "a list": ("[]", "is damaged"),
    "a size in words": (
        '{"format_version": 1, "algorithm": "blake2b-16", "file_bytes": "9", "block_bytes": 9, "blocks": [""]}',
        "file_bytes must be int",
    ),
    "blocks that are numbers": (
        '{"format_version": 1, "algorithm": "blake2b-16", "file_bytes": 9, "block_bytes": 9, "blocks": [5]}',
        "is damaged",
    ),
    "another version": (
        '{"format_version": 2, "algorithm": "blake2b-16", "file_bytes": 1, "block_bytes": 1, "blocks": [""]}',
        "in version 2, this byrote reads",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_SIDECARS.values(), ids=BAD_SIDECARS)
def test_bad_sidecars_are_refused(path, content, message):
    sidecar(path).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        verify(path)
    assert str(sidecar(path)) in str(error.value)


def test_a_sidecar_of_a_larger_file_reads_no_more_than_there_is(path):
    about = {
        "format_version": 1,
        "algorithm": "blake2b-16",
        "file_bytes": 10**17,
        "block_bytes": 10**17,
        "blocks": [""],
    }
    sidecar(path).write_text(json.dumps(about))
    assert [damage.number for damage in verify(path)] == [0]


def test_a_sidecar_is_not_written_over(path, tmp_path):
    with pytest.raises(ValueError, match="is there already"):
        write_sums(path)
    for call in (verify, write_sums):
        with pytest.raises(ValueError, match="no such file"):
            call(tmp_path / "none")
