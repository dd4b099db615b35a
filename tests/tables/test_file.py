"""Tables in files: what a RamTable reads, read in place; released layouts; nothing is ever written."""

import copy
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from byrote.tables import RamTable, Table
from byrote.tables.codecs import CODECS
from byrote.tables.files import reads
from byrote.tables.files.released import released_tables
from byrote.tables.placements.cached import CachedTable
from byrote.tables.placements.file import FileTable
from byrote.tables.placements.logged import LoggedTable

ROWS, DIGEST = 500, "d" * 64


@pytest.fixture(params=["positioned", "mapped", "plain"])
def way(request, monkeypatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr("byrote.tables.files.reads.numba_is_there", lambda: False)
        monkeypatch.setattr("byrote.tables.records.numba_is_there", lambda: False)
    monkeypatch.setattr(reads, "resident", lambda *_: request.param == "mapped")
    return request.param


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Bit by bit, where NaN is NaN."""
    return first.dtype == second.dtype and torch.equal(first.isnan(), second.isnan()) and (
        torch.equal(first.nan_to_num(7.5, 1e30, -1e30), second.nan_to_num(7.5, 1e30, -1e30))
    )  # fmt: skip


@pytest.mark.parametrize("width", [1, 40, 67])
@pytest.mark.parametrize("codec", CODECS)
def test_it_reads_what_a_ram_table_reads(tmp_path, codec, width, way):
    ram = RamTable(ROWS, width, digest=DIGEST, codec=codec, seed=1)
    ram.generation = 5
    ram.save(tmp_path / "t")
    table = FileTable.open(tmp_path / "t", num_rows=ROWS, width=width, digest=DIGEST)
    assert isinstance(table, Table) and table.generation == 5 and table.codec == codec
    assert table.stats() == {**ram.stats(), "state_bytes": 0}
    for rows in (torch.arange(ROWS), torch.randint(0, ROWS, (3, 7, 50)), torch.tensor(4), torch.zeros(0).long()):
        assert torch.equal(table.read(rows), ram.read(rows))
    table.save(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "t").read_bytes()
    table.save_state(tmp_path / "state")
    ram.save_state(tmp_path / "ram-state")
    assert (tmp_path / "state").read_bytes() == (tmp_path / "ram-state").read_bytes()


def test_what_is_read_begins_at_a_cache_line(tmp_path):
    """As torch's own memory does: where it begins, vector units decide in which order a product is summed."""
    RamTable(ROWS, 5, digest=DIGEST).save(tmp_path / "t")
    table = FileTable.open(tmp_path / "t")
    assert all(table.read(torch.arange(count)).data_ptr() % 64 == 0 for count in (1, 7, 100, 500))


def test_it_is_shared_not_pickled_and_never_written(tmp_path):
    RamTable(ROWS, 4, digest=DIGEST).save(tmp_path / "t")
    before = (tmp_path / "t").read_bytes()
    table = FileTable.open(tmp_path / "t")
    assert copy.deepcopy(table) is table
    with pytest.raises(TypeError, match="save_pretrained"):
        pickle.dumps(table)
    for call in (
        lambda: table.write(torch.tensor([1]), torch.ones(1, 4)),
        table.commit,
        lambda: table.load_state(tmp_path / "t"),
    ):
        with pytest.raises(ValueError, match=r"reading only.*placement='host'.*train.placement='file'") as error:
            call()
        assert str(tmp_path / "t") in str(error.value)
    assert table.generation == 0 and (tmp_path / "t").read_bytes() == before
    state = table.read_state(torch.tensor([3, 4]), {"moment": (4,), "touches": ()})
    assert state["moment"].shape == (2, 4) and state["touches"].shape == (2,) and not state["moment"].any()


def test_a_log_over_a_file_leaves_the_file(tmp_path):
    RamTable(ROWS, 4, digest=DIGEST, codec="fp8").save(tmp_path / "t")
    before = (tmp_path / "t").read_bytes()
    table = LoggedTable.create(FileTable.open(tmp_path / "t"), tmp_path / "log", {}, "../t")
    table.write(torch.tensor([9]), torch.full((1, 4), 0.25))
    table.commit()
    table.checkpoint(tmp_path / "pointer")
    table.log.unlock()
    opened = LoggedTable.open(tmp_path / "pointer", num_rows=ROWS, width=4, digest=DIGEST)
    assert isinstance(opened.base, FileTable)
    assert torch.equal(opened.read(torch.arange(ROWS)), opened.in_memory().read(torch.arange(ROWS)))
    assert torch.equal(opened.read(torch.tensor([9])), torch.full((1, 4), 0.25))
    assert (tmp_path / "t").read_bytes() == before


BAD_JSON = {
    "cut": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "null": lambda text: "null",
    "too deep": lambda text: "[" * 200_000,
    "no UTF-8": lambda text: text.encode("utf-16"),
    "a key twice": lambda text: text.replace("{", '{"format_version": 1, ', 1),
    "numbers in words": lambda text: re.sub(r": (\d+)([,}])", r': "\1"\2', text).replace(
        'version": "1"', 'version": 1'
    ),
    "negative numbers": lambda text: re.sub(r": (\d+)([,}])", r": -\1\2", text).replace('version": -1', 'version": 1'),
    "fields that are gone": lambda text: '{"format_version": 1}',
}


@pytest.mark.parametrize("name", ["pointer", "log/log.json", "log/manifest-000000001.json"])
@pytest.mark.parametrize("spoil", BAD_JSON.values(), ids=BAD_JSON)
def test_damage_around_a_log_is_named(tmp_path, spoil, name):
    RamTable(ROWS, 4, digest=DIGEST).save(tmp_path / "t")
    table = LoggedTable.create(FileTable.open(tmp_path / "t"), tmp_path / "log", {"moment": (4,)}, "../t")
    table.write(torch.tensor([9]), torch.ones(1, 4))
    table.commit()
    table.checkpoint(tmp_path / "pointer")
    table.log.unlock()
    spoiled = spoil((tmp_path / name).read_text())
    (tmp_path / name).write_bytes(spoiled if isinstance(spoiled, bytes) else spoiled.encode())
    with pytest.raises(ValueError, match=r"is damaged") as error:
        LoggedTable.open(tmp_path / "pointer", num_rows=ROWS, width=4, digest=DIGEST)
    assert str(tmp_path / name) in str(error.value)


def test_a_cache_over_a_file(tmp_path):
    ram = RamTable(ROWS, 4, digest=DIGEST, codec="fp8")
    ram.save(tmp_path / "t")
    table = CachedTable(FileTable.open(tmp_path / "t"), 4000)
    for seed in range(5):
        rows = torch.randint(0, ROWS, (2, 60), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(table.read(rows), ram.read(rows))
    assert table.stats()["hits"] > 0 and table.stats()["codec"] == "fp8"


WIDTH = 64
VALUES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
}
FORMS = [(name, None, 0) for name in VALUES]
FORMS += [
    (name, scale, count) for name in ("F8_E4M3", "I8", "BF16") for scale in ("F8_E8M0", "F32") for count in (1, 2)
]
FORMS += [("F8_E4M3", "U8", 2), ("F8_E4M3", "BF16", 4)]


def release(folder, values: str, scale: str | None, scales: int) -> tuple[torch.Tensor, str, str | None]:
    """A checkpoint folder with a table of random bytes, and its rows as a formula gives them."""
    generator = torch.Generator().manual_seed(3)
    name = "layers.1.engram.embed"
    stored = (torch.randn(ROWS, WIDTH, generator=generator) * 20).clamp(-100, 100).to(VALUES[values])
    tensors = {f"{name}.weight": stored, "layers.1.engram.q_weight": torch.zeros(2, 2)}
    rows = stored.double()
    if scale in ("F8_E8M0", "U8"):
        exponents = torch.randint(100, 140, (ROWS, scales), generator=generator)
        factors = 2.0 ** (exponents.double() - 127)
        bytes_ = exponents.to(torch.uint8)
        tensors[f"{name}.scale"] = bytes_ if scale == "U8" else bytes_.view(torch.float8_e8m0fnu)
    elif scale:
        kept = torch.rand(ROWS, scales, generator=generator).to(VALUES[scale])
        tensors[f"{name}.scale"], factors = kept, kept.double()
    if scale:
        rows = (rows.view(ROWS, scales, -1) * factors[..., None]).view(ROWS, WIDTH)
    save_file(tensors, folder / "model.safetensors")
    return rows.float(), f"{name}.weight", f"{name}.scale" if scale else None


@pytest.mark.parametrize(("values", "scale", "scales"), FORMS)
def test_released_tables_are_read_as_they_are(tmp_path, values, scale, scales, way):
    expected, weight_name, scale_name = release(tmp_path, values, scale, scales)
    assert released_tables(tmp_path) == released_tables(tmp_path / "model.safetensors") == {weight_name: scale_name}
    table = FileTable.released(tmp_path, weight_name, scale_name, digest=DIGEST)
    assert isinstance(table, Table) and (table.num_rows, table.width, table.digest) == (ROWS, WIDTH, DIGEST)
    assert same(table.read(torch.arange(ROWS)), expected)
    rows = torch.randint(0, ROWS, (4, 100))
    assert same(table.read(rows), expected[rows])
    assert table.read(rows[:0]).shape == (0, 100, WIDTH)
    size = VALUES[values].itemsize * WIDTH + scales * {None: 0, "F32": 4, "BF16": 2}.get(scale, 1)
    assert table.stats()["bytes"] == ROWS * size
    table.save(tmp_path / "ours")
    ours = RamTable.open(tmp_path / "ours", num_rows=ROWS, width=WIDTH, digest=DIGEST)
    assert ours.codec == table.codec and same(ours.read(torch.arange(ROWS)), expected)


def test_the_released_fp8_row_keeps_its_codec(tmp_path):
    for scale in ("F8_E8M0", "U8"):
        release(tmp_path, "F8_E4M3", scale, 2)
        table = FileTable.released(tmp_path, "layers.1.engram.embed.weight", "layers.1.engram.embed.scale")
        assert table.codec == "fp8" and str(table.form) == f"F8_E4M3 with a scale {scale} for each 32 values"
    assert str(FileTable.released(tmp_path, "layers.1.engram.embed.weight").form) == "F8_E4M3"


@pytest.mark.parametrize(("scale", "codec"), [("F8_E8M0", "fp8"), ("F32", "fp32")])
def test_a_log_over_a_released_table(tmp_path, scale, codec):
    """Released rows can be trained: what changes is stored so that nothing is lost of the rest."""
    expected, *names = release(tmp_path, "F8_E4M3", scale, 2)
    table = LoggedTable.create(FileTable.released(tmp_path, *names, digest=DIGEST), tmp_path / "log", {"sum_sq": ()})
    rows, values = torch.tensor([3, 400]), torch.full((2, WIDTH), 0.5)
    table.write(rows, values, {"sum_sq": torch.ones(2)})
    table.commit()
    expected[rows] = values
    assert same(table.read(torch.arange(ROWS)), expected) and table.read_state(rows, {"sum_sq": ()})["sum_sq"].all()
    table.save(tmp_path / "ours")
    ours = RamTable.open(tmp_path / "ours", num_rows=ROWS, width=WIDTH, digest=DIGEST)
    assert ours.codec == codec and ours.generation == 1 and same(ours.read(torch.arange(ROWS)), expected)


def test_a_scale_of_nan_reads_as_nan(tmp_path, way):
    exponents = torch.tensor([[127, 255], [0, 254]], dtype=torch.uint8)
    save_file({"v": torch.ones(2, 64).to(torch.float8_e4m3fn), "s": exponents}, tmp_path / "f")
    read = FileTable.released(tmp_path / "f", "v", "s").read(torch.tensor([0, 1]))
    assert (read[0, :32] == 1).all() and read[0, 32:].isnan().all()
    assert (read[1, :32] == 2.0**-127).all() and (read[1, 32:] == 2.0**127).all()


def test_parts_of_a_released_table(tmp_path, way):
    values, scales = torch.randn(90, 64).to(torch.float8_e4m3fn), torch.randint(90, 150, (90, 2), dtype=torch.uint8)
    whole = FileTable.released
    save_file({"v": values, "s": scales, "v0": values[:30].clone(), "v1": values[30:].clone()}, tmp_path / "f")
    rows = torch.randint(0, 90, (300,))
    expected = whole(tmp_path / "f", "v", "s").read(rows)
    assert torch.equal(whole(tmp_path / "f", ["v0", "v1"], "s").read(rows), expected)
    assert torch.equal(whole(tmp_path / "f", ["v0", "v1"]).read(rows), values.float()[rows])


BAD_RELEASES = {
    "rows": ({"v": torch.zeros(4, 64), "s": torch.zeros(5, 2)}, "v holds 4 rows, s 5"),
    "block": ({"v": torch.zeros(4, 64), "s": torch.zeros(4, 3)}, "3 scales a row do not divide 64 values"),
    "vector": ({"v": torch.zeros(4), "s": torch.zeros(4, 2)}, "must be .rows, width."),
    "dtype": ({"v": torch.zeros(4, 64, dtype=torch.int32), "s": torch.zeros(4, 2)}, "values of I32"),
    "scale dtype": ({"v": torch.zeros(4, 64), "s": torch.zeros(4, 2, dtype=torch.int32)}, "scales of I32"),
}


@pytest.mark.parametrize(("tensors", "message"), BAD_RELEASES.values(), ids=BAD_RELEASES)
def test_what_is_no_released_table_is_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "f")
    with pytest.raises(ValueError, match=message):
        FileTable.released(tmp_path / "f", "v", "s")
