"""Rows of safetensors files, opened in place: any dtype, shards, parts; both ways to read; what a damaged file does."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from byrote.tables.files import reads
from byrote.tables.files import rows as rowsfile
from byrote.tables.files.headers import INDEX, find_tensor, read_header
from byrote.tables.files.rows import RowsFile

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
}


def tensor(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = rows * width * dtype.itemsize
    return torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype).view(rows, width)


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8).reshape(len(values), -1)


@pytest.fixture(params=["positioned", "mapped", "plain"])
def way(request, monkeypatch) -> str:
    """Each way to read, whatever is in memory."""
    if request.param == "plain":
        monkeypatch.setattr(reads, "numba_is_there", lambda: False)
    monkeypatch.setattr(reads, "resident", lambda *_: request.param == "mapped")
    return request.param


@pytest.mark.parametrize("name", DTYPES)
def test_rows_of_any_dtype(tmp_path, name, way):
    values = tensor(300, 7, DTYPES[name])
    save_file({"x": tensor(3, 5), "rows": values, "y": tensor(2, 2)}, tmp_path / "f", {"note": "é"})
    file = RowsFile.open(tmp_path / "f", "rows")
    assert (file.num_rows, file.row_bytes, file.dtype, file.row_shape) == (300, values[0].nbytes, name, (7,))
    ids = torch.randint(0, 300, (1000,))
    assert torch.equal(file.read(ids), as_bytes(values)[ids])
    assert file.read(ids[:0]).shape == (0, file.row_bytes)


def sharded(folder: Path) -> torch.Tensor:
    """Three parts of a table in two shards, among other tensors."""
    parts = [tensor(rows, 9, torch.bfloat16, seed) for seed, rows in enumerate((50, 1, 70))]
    save_file({"part.0": parts[0], "other": tensor(2, 3)}, folder / "model-1.safetensors")
    save_file({"part.2": parts[2], "part.1": parts[1]}, folder / "model-2.safetensors")
    shards = {"part.0": 1, "other": 1, "part.1": 2, "part.2": 2}
    content = {"weight_map": {name: f"model-{shard}.safetensors" for name, shard in shards.items()}}
    (folder / INDEX).write_text(json.dumps(content))
    return torch.cat(parts)


def test_parts_along_rows_of_a_sharded_checkpoint(tmp_path, way):
    whole = sharded(tmp_path)
    file = RowsFile.open(tmp_path, ["part.0", "part.1", "part.2"])
    assert file.num_rows == 121
    for ids in (torch.randint(0, 121, (500,)), torch.arange(121), torch.tensor([50]), torch.tensor([120, 0, 120])):
        assert torch.equal(file.read(ids), as_bytes(whole)[ids])
    assert torch.equal(RowsFile.open(tmp_path, "part.2").read(torch.tensor([69])), as_bytes(whole)[120:])


def test_a_folder_with_one_file(tmp_path):
    values = tensor(5, 2)
    save_file({"rows": values}, tmp_path / "model.safetensors")
    assert torch.equal(RowsFile.open(tmp_path, "rows").read(torch.arange(5)), as_bytes(values))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 400),
    width=st.integers(1, 80),
    picks=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=300),
    threads=st.integers(1, 5),
    most=st.sampled_from([1, 100, 1 << 20]),
)
def test_compiled_reads_equal_plain_ones(tmp_path_factory, rows, width, picks, threads, most):
    path = tmp_path_factory.mktemp("preads") / "file"
    content = np.random.default_rng(0).integers(0, 256, 13 + rows * width, np.uint8)
    path.write_bytes(content.tobytes())
    ids = np.unique((np.array(picks) * rows).astype(np.int64))
    outs = [np.empty((len(ids), width), np.uint8) for _ in range(2)]
    with open(path, "rb") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reads, "RUN_BYTES", most)
        patch.setattr(reads, "LEAST", 1)
        reads.read([(file.fileno(), len(ids))], 13 + ids * width, outs[0], threads)
        reads.read_twin(file.fileno(), 13 + ids * width, outs[1])
    expected = content[13:].reshape(rows, width)[ids]
    assert (outs[0] == expected).all() and (outs[1] == expected).all()


@pytest.mark.parametrize("compiled", [True, False])
def test_resident_tells_what_is_in_memory(tmp_path, monkeypatch, compiled):
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("needs preadv2")
    monkeypatch.setattr(reads, "numba_is_there", lambda: compiled)
    path = tmp_path / "file"
    path.write_bytes(b"x" * (1 << 20))
    places = np.arange(0, 10**6, 50_000)
    with open(path, "rb") as file:
        file.read()
        if not reads.resident(file.fileno(), places, 1000):
            pytest.skip("a file system that always waits")
        assert not reads.resident(file.fileno(), np.array([10_000, 5_000_000]), 1000)  # beyond the end
        os.fsync(os.open(path, os.O_RDWR))
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if reads.resident(file.fileno(), places, 1000):
            pytest.skip("a file system in memory")


def test_a_file_is_read_after_it_was_deleted(tmp_path, way):
    values = tensor(20, 3)
    save_file({"rows": values}, tmp_path / "f")
    file = RowsFile.open(tmp_path / "f", "rows")
    (tmp_path / "f").unlink()
    assert torch.equal(file.read(torch.arange(20)), as_bytes(values))


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("left", [0, 5, 8, 40, 200, -1])
def test_a_truncated_file_is_refused_at_open(tmp_path, left):
    path = tmp_path / "f"
    save_file({"rows": tensor(100, 3)}, path)
    size = path.stat().st_size
    cut(path, left % size)
    with pytest.raises(ValueError, match="truncated") as error:
        RowsFile.open(path, "rows")
    assert str(path) in str(error.value) and f"{left % size} bytes" in str(error.value)


def test_a_file_cut_after_open_is_an_error_at_the_read(tmp_path, way):
    path = tmp_path / "f"
    save_file({"rows": tensor(5000, 3)}, path)
    size = path.stat().st_size
    file = RowsFile.open(path, "rows")
    file.read(torch.arange(5000))
    cut(path, size - 6000)
    for ids in (torch.arange(5000), torch.tensor([4999]), torch.tensor([1])):
        with pytest.raises(ValueError, match=f"truncated: {size - 6000} bytes, tensor rows ends at byte {size}"):
            file.read(ids)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_short_read_is_an_error(tmp_path, monkeypatch, compiled):
    """The file is cut between the question for its size and the read."""
    path = tmp_path / "f"
    save_file({"rows": tensor(5000, 3)}, path)
    file = RowsFile.open(path, "rows")
    cut(path, 4096)
    monkeypatch.setattr(rowsfile._Part, "_check_size", lambda self: None)
    monkeypatch.setattr(reads, "numba_is_there", lambda: compiled)
    with pytest.raises(ValueError, match="ends at byte 4096"):
        file.read(torch.arange(5000))


def header(text: bytes, data: int = 0) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(data)


BAD_FILES = {
    "no JSON": (header(b"{" * 16), "header is damaged"),
    "a list": (header(b"[1, 2]"), "header is damaged"),
    "no dtype": (header(b'{"rows": {"shape": [1], "data_offsets": [0, 4]}}', 4), "header is damaged"),
    "sizes that do not agree": (
        header(b'{"rows": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}', 4),
        "cannot lie at bytes 0 to 4",
    ),
    "a negative place": (
        header(b'{"rows": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}', 4),
        "cannot lie",
    ),
    "an unknown dtype": (
        header(b'{"rows": {"dtype": "F3", "shape": [4], "data_offsets": [0, 4]}}', 4),
        "header is damaged",
    ),
    "a number": (header(b"17"), "header is damaged .*no object but 17"),
    "null": (header(b"null"), "header is damaged"),
    "of no length": (header(b""), "header is damaged"),
    "too deep": (header(b'{"rows": ' + b"[" * 200_000), "header is damaged"),
    "UTF-16": (header('{"rows": 1}'.encode("utf-16")), "header is damaged .*utf-8"),
    "no UTF-8": (header(b'{"\xff": 1}'), "header is damaged .*utf-8"),
    "metadata that is no object": (header(b'{"__metadata__": [1]}'), "__metadata__ must hold strings"),
    "metadata that is no string": (header(b'{"__metadata__": {"a": 1}}'), "__metadata__ must hold strings"),
    "a tensor twice": (header(b'{"rows": {}, "rows": {}}'), "'rows' is there twice"),
    "a tensor that is no object": (header(b'{"rows": null}'), "header is damaged"),
    "a dtype that is a list": (
        header(b'{"rows": {"dtype": ["U8"], "shape": [4], "data_offsets": [0, 4]}}', 4),
        "header is damaged",
    ),
    "a size in quotes": (
        header(b'{"rows": {"dtype": "U8", "shape": ["4"], "data_offsets": [0, 4]}}', 4),
        "must be integers",
    ),
    "a size of 1.5": (header(b'{"rows": {"dtype": "U8", "shape": [1.5], "data_offsets": [0, 1]}}', 1), "integers"),
    "three offsets": (
        header(b'{"rows": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}}', 4),
        "header is damaged",
    ),
    "a hole": (header(b'{"rows": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}', 8), "leaves a hole"),
    "tensors that overlap": (
        header(
            b'{"rows": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},'
            b' "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}',
            6,
        ),
        "tensor b overlaps",
    ),
    "beyond the file": (header(b'{"rows": {"dtype": "U8", "shape": [99], "data_offsets": [0, 99]}}', 4), "truncated"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "too long": (header(b'{"rows": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}', 7), "longer than"),
    "an endless header": (b"\xff" * 64, "not a safetensors file"),
}


def test_metadata_may_be_null_and_a_header_padded(tmp_path):
    text = b'{"__metadata__": null, "rows": {"dtype": "U8", "shape": [4, 1], "data_offsets": [0, 4]}}  '
    (tmp_path / "f").write_bytes(header(text, 4))
    assert read_header(tmp_path / "f")[1] == {}
    assert RowsFile.open(tmp_path / "f", "rows").num_rows == 4


@pytest.mark.parametrize("shard", ["../model-1.safetensors", "/etc/passwd", "a/b", "a\\b", "..", "", 3, None])
def test_an_index_leads_nowhere_else(tmp_path, shard):
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ValueError, match=f"{INDEX}: x is said to lie in"):
        RowsFile.open(tmp_path, "x")


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_refused(tmp_path, content, message):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        RowsFile.open(tmp_path / "f", "rows")
    assert str(tmp_path / "f") in str(error.value)


def test_what_is_not_there_is_named(tmp_path):
    sharded(tmp_path)
    with pytest.raises(ValueError, match=r"no tensor 'x' in its shards; they hold other, part\.0"):
        RowsFile.open(tmp_path, "x")
    with pytest.raises(ValueError, match="no tensor 'x'; it holds other, part"):
        RowsFile.open(tmp_path / "model-1.safetensors", "x")
    with pytest.raises(ValueError, match="neither"):
        RowsFile.open(tmp_path.parent, "x")
    with pytest.raises(ValueError, match="no such file"):
        RowsFile.open(tmp_path / "none", "x")
    with pytest.raises(ValueError, match=r"not rows as in part\.0"):
        RowsFile.open(tmp_path, ["part.0", "other"])
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        RowsFile.open(tmp_path, "x")


def test_no_rows_and_bad_ids(tmp_path):
    save_file({"none": torch.zeros(0, 4), "rows": torch.zeros(3, 4)}, tmp_path / "f")
    with pytest.raises(ValueError, match="holds no rows"):
        RowsFile.open(tmp_path / "f", "none")
    file = RowsFile.open(tmp_path / "f", "rows")
    for ids in (torch.tensor([3]), torch.tensor([-1]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="row"):
            file.read(ids)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(file)


def test_headers_agree_with_the_library(tmp_path):
    tensors = {name: tensor(4, 6, dtype) for name, dtype in DTYPES.items()} | {"scalar": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "f", {"a": "b"})
    places, metadata = read_header(tmp_path / "f")
    assert metadata == {"a": "b"} and set(places) == set(tensors)
    content = (tmp_path / "f").read_bytes()
    for name, value in tensors.items():
        place = find_tensor(tmp_path / "f", name)
        data = torch.frombuffer(bytearray(content[place.start : place.start + place.num_bytes]), dtype=value.dtype)
        assert as_bytes(data.reshape(-1, 1)).equal(as_bytes(value.reshape(-1, 1))), name
        assert place.shape == tuple(value.shape)


SPARSE = """
import json, sys
from pathlib import Path
import torch
from byrote.tables.files.rows import RowsFile

def kilobytes(*names):
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return [found[name] for name in names]

rows, path = int(sys.argv[1]), Path(sys.argv[2])
torch.arange(10) @ torch.arange(10)
before = kilobytes("VmHWM", "RssFile")
file = RowsFile.open(path, "rows")
opened = kilobytes("VmHWM", "RssFile")
generator = torch.Generator().manual_seed(0)
for _ in range(3):
    for ids in [torch.randint(0, rows, (4096,), generator=generator)] * 2:  # cold, then resident
        assert not file.read(ids).any()
print(json.dumps([before, opened, kilobytes("VmHWM", "RssFile")]))
"""


def test_memory_does_not_follow_the_table(tmp_path):
    """A sparse file of 16 GB: the peak less the pages of files."""
    rows, width = 10**8, 40
    text = {"rows": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, 4 * rows * width]}}
    start = header(json.dumps(text).encode())
    (tmp_path / "f").write_bytes(start)
    os.truncate(tmp_path / "f", len(start) + 4 * rows * width)
    command = [sys.executable, "-c", SPARSE, str(rows), str(tmp_path / "f")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, opened, read = json.loads(re.findall(r"\[\[.*", said)[0])
    assert opened[0] - before[0] < 8 << 10
    assert read[0] - read[1] - (before[0] - before[1]) < 100 << 10
