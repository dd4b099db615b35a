"""Few rows over any table: what is read, what stays, the small file. The contract itself is in test_table.py."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from byrote import EngramConfig, EngramForCausalLM
from byrote.tables import RamTable
from byrote.tables.codecs import CODECS
from byrote.tables.placements.cached import CachedTable
from byrote.tables.placements.file import FileTable
from byrote.tables.placements.overlay import OverlayTable
from byrote.tables.placements.sparse import SparseRows
from byrote.train.optimizer import Optimizer

ROWS, WIDTH, DIGEST = 60, 4, "d" * 64
WANTED = {"num_rows": ROWS, "width": WIDTH, "digest": DIGEST}
EVERY = torch.arange(ROWS)


def base(codec: str = "fp32") -> RamTable:
    return RamTable(ROWS, WIDTH, digest=DIGEST, seed=1, codec=codec)


def some_rows(codec: str = "fp32", ids=(40, 3, 17)) -> SparseRows:
    top = SparseRows(ROWS, WIDTH, digest=DIGEST, codec=codec)
    top.write(
        torch.tensor(ids, dtype=torch.int64), torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(0))
    )
    return top


@pytest.mark.parametrize("below", ["ram", "mapped", "cached", "overlay"])
def test_a_row_of_the_overlay_hides_the_one_below(tmp_path, below):
    table = base()
    expected = table.read(EVERY)
    table.save(tmp_path / "table")
    tables = {"ram": lambda: table, "mapped": lambda: FileTable.open(tmp_path / "table")}
    tables |= {"cached": lambda: CachedTable(table, 4000), "overlay": lambda: OverlayTable(table, some_rows(ids=[5]))}
    lower = tables[below]()
    expected, top = lower.read(EVERY), some_rows()
    overlay = OverlayTable(lower, top)
    expected[[3, 17, 40]] = top.read(top.find(torch.tensor([3, 17, 40])))
    assert torch.equal(overlay.read(EVERY), expected)
    assert torch.equal(overlay.read(EVERY.view(3, 20)), expected.view(3, 20, WIDTH))
    assert not torch.equal(lower.read(EVERY), expected) and overlay.stats()["overlay_rows"] == 3


def test_it_is_for_reading_unless_it_is_writable(tmp_path):
    overlay = OverlayTable(base(), some_rows())
    overlay.save_state(tmp_path / "state")
    before, rows = overlay.read(EVERY), torch.tensor([1])
    for call in (
        lambda: overlay.write(rows, torch.ones(1, WIDTH)),
        overlay.commit,
        lambda: overlay.load_state(tmp_path / "state"),
    ):
        with pytest.raises(ValueError, match="writable=True"):
            call()
    assert torch.equal(overlay.read(EVERY), before) and overlay.generation == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, ROWS - 1), unique=True, max_size=20), max_size=8), st.randoms())
def test_writes_against_a_dense_twin(writes, random):
    """With and without state, in any order: values, state and the ids of the overlay; the base stands still."""
    lower = base()
    untouched, values, state = lower.read(EVERY), lower.read(EVERY), torch.zeros(ROWS, 2)
    overlay, written = OverlayTable(lower, some_rows(ids=[]), writable=True), set()
    for ids in writes:
        rows, new = torch.tensor(ids, dtype=torch.int64), torch.randn(len(ids), WIDTH)
        fresh = torch.randn(len(ids), 2)
        with_state = random.random() < 0.5
        overlay.write(rows, new, {"moment": fresh} if with_state else None)
        values[rows] = new
        if with_state:
            state[rows] = fresh
        written |= set(ids)
        assert torch.equal(overlay.read(EVERY), values)
        assert torch.equal(overlay.read_state(EVERY, {"moment": (2,)})["moment"], state)
    assert overlay.top.ids().tolist() == sorted(written)
    assert torch.equal(lower.read(EVERY), untouched) and lower.generation == 0


@pytest.mark.parametrize("codec", CODECS)
def test_the_file_of_an_overlay(tmp_path, codec):
    top = some_rows(codec)
    top.save(tmp_path / "top")
    opened = SparseRows.open(tmp_path / "top", **WANTED)
    assert opened.codec == codec and opened.ids().tolist() == [3, 17, 40]
    lower = base()
    assert torch.equal(OverlayTable(lower, opened).read(EVERY), OverlayTable(lower, top).read(EVERY))
    opened.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "top").read_bytes()
    with safe_open(tmp_path / "top", framework="pt") as file:
        assert json.loads(file.metadata()["byrote"])["digest"] == DIGEST
        assert file.get_tensor("rows").tolist() == [3, 17, 40] and len(file.get_tensor("values")) == 3


@pytest.mark.parametrize("codec", CODECS)
def test_the_file_of_an_overlay_without_a_row(tmp_path, codec):
    some_rows(codec, ids=[]).save(tmp_path / "top")
    opened = SparseRows.open(tmp_path / "top", **WANTED)
    assert len(opened) == 0 and torch.equal(OverlayTable(base(), opened).read(EVERY), base().read(EVERY))


def rewrite(path, rows=None, values=None, **changed) -> None:
    with safe_open(path, framework="pt") as file:
        header = {**json.loads(file.metadata()["byrote"]), **changed}
        tensors = {"rows": file.get_tensor("rows").clone(), "values": file.get_tensor("values").clone()}
    tensors |= {name: tensor for name, tensor in (("rows", rows), ("values", values)) if tensor is not None}
    save_file(tensors, path, {"byrote": json.dumps(header)})


BAD_FILES = {
    "absent": (lambda path: path.unlink(), "no such table file"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-5]), "truncated"),
    "another digest": (lambda path: rewrite(path, digest="e" * 64), "digest is e+, the table below has d+"),
    "more rows": (lambda path: rewrite(path, num_rows=ROWS + 1), "num_rows is 61, the table below has 60"),
    "wider": (lambda path: rewrite(path, width=WIDTH + 1), "width is 5"),
    "a whole table": (lambda path: base().save(path), "no tensor 'values'"),
    "twice the same row": (lambda path: rewrite(path, rows=torch.tensor([3, 17, 17])), "entries 1 and 2 are 17 and 17"),
    "not ascending": (lambda path: rewrite(path, rows=torch.tensor([17, 3, 40])), "entries 0 and 1 are 17 and 3"),
    "negative": (lambda path: rewrite(path, rows=torch.tensor([-1, 3, 40])), "row ids -1..40 leave the table"),
    "too large": (lambda path: rewrite(path, rows=torch.tensor([3, 17, ROWS])), "row ids 3..60 leave the table"),
    "int32": (lambda path: rewrite(path, rows=torch.tensor([3, 17, 40], dtype=torch.int32)), "rows must be int64"),
    "fewer values": (lambda path: rewrite(path, values=torch.ones(2, WIDTH)), r"\[3, 4\].*got torch.float32 \[2, 4\]"),
    "another dtype": (lambda path: rewrite(path, values=torch.ones(3, WIDTH).half()), "got torch.float16"),
    "another codec": (lambda path: rewrite(path, codec="int8"), r"torch.uint8 \[3, 8\]"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused(tmp_path, spoil, message):
    some_rows().save(tmp_path / "top")
    spoil(tmp_path / "top")
    with pytest.raises(ValueError, match=message) as error:
        SparseRows.open(tmp_path / "top", **WANTED)
    assert str(tmp_path / "top") in str(error.value)


@pytest.mark.parametrize(("field", "value"), [("digest", "e" * 64), ("num_rows", ROWS + 1), ("width", WIDTH + 1)])
def test_an_overlay_of_another_table_is_refused(field, value):
    wanted = {**WANTED, field: value}
    top = SparseRows(wanted.pop("num_rows"), wanted.pop("width"), **wanted)
    with pytest.raises(ValueError, match=f"the overlay has {field} {value}"):
        OverlayTable(base(), top)


def test_a_merged_table_has_the_codec_of_the_base(tmp_path):
    overlay = OverlayTable(base(), some_rows("int8"))  # what int8 reads, float32 holds
    assert overlay.stats()["codec"] == "mixed"
    overlay.save(tmp_path / "table")
    assert torch.equal(RamTable.open(tmp_path / "table", **WANTED).read(EVERY), overlay.read(EVERY))
    with pytest.raises(ValueError, match=r"would hold codec int8 and change rows of the overlay, which is fp32"):
        OverlayTable(base("int8"), some_rows()).save(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="codec must be one of"):
        SparseRows(ROWS, WIDTH, digest=DIGEST, codec="fp16")


def test_a_merged_file_is_that_of_one_table(tmp_path):
    """The bytes that a RamTable with these rows writes."""
    overlay, plain = OverlayTable(base(), some_rows(), writable=True), base()
    top = overlay.top
    plain.write(top.ids(), top.read(top.find(top.ids())))
    overlay.save(tmp_path / "overlay")
    plain.save(tmp_path / "plain")
    assert (tmp_path / "overlay").read_bytes() == (tmp_path / "plain").read_bytes()


def train(model: EngramForCausalLM) -> None:
    optimizer = Optimizer(model, lr=3e-3)
    for step in range(3):
        ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_training_an_overlay_equals_training_the_table(tmp_path):
    """To the last bit; the base keeps its rows, and the small file brings the trained ones to another model."""
    models = []
    for overlaid in (False, True):
        torch.manual_seed(0)
        model = EngramForCausalLM(EngramConfig.from_preset("nano", vocab_size=64, memory_layers=[1])).train()
        memory = model.memory_stack.items()[0][1]
        if overlaid:
            lower, every = memory.table, torch.arange(memory.table.num_rows)
            before = lower.read(every)
            top = SparseRows(lower.num_rows, lower.width, digest=lower.digest)
            memory.table = OverlayTable(lower, top, writable=True)
        train(model)
        models.append(model)
    tables = [model.memory_stack.items()[0][1].table for model in models]
    assert tables[0].generation == tables[1].generation == 3
    assert torch.equal(tables[0].read(every), tables[1].read(every)) and torch.equal(lower.read(every), before)
    for name, table in zip("ab", tables, strict=True):
        table.save_state(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert 0 < len(top) == tables[0].stats()["rows_touched"]
    top.save(tmp_path / "top")
    size = {"num_rows": lower.num_rows, "width": lower.width, "digest": lower.digest}
    again = OverlayTable(lower, SparseRows.open(tmp_path / "top", **size))
    assert torch.equal(again.read(every), tables[0].read(every)) and again.generation == 0
