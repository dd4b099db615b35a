"""The contract of `byrote.tables.Table`, for every placement and codec; a new one joins in KINDS."""

import copy
import itertools
import json
import os
import pickle
import resource
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from byrote.memory import Memory
from byrote.tables import LazyAdam, RamTable, RowRule, Table
from byrote.tables.codecs import CODECS
from byrote.tables.files.format import header_of, stream
from byrote.tables.placements.device import DeviceTable
from byrote.tables.placements.file import FileTable
from byrote.tables.placements.logged import LoggedTable
from byrote.tables.placements.overlay import OverlayTable
from byrote.tables.placements.pinned import PinnedTable
from byrote.tables.placements.ranks import Ranks
from byrote.tables.placements.sharded import ShardedTable
from byrote.tables.placements.sparse import SparseRows

ROWS, WIDTH, DIGEST = 40, 3, "d" * 64
FIELDS = {"moment": (WIDTH,), "touches": ()}


@dataclass(frozen=True)
class Kind:
    """How to make a table, how to open a saved one, and what comes back of values that were written."""

    make: Callable[..., Table]
    open: Callable[..., Table]
    stored: Callable[[torch.Tensor], torch.Tensor]


def through(codec: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda values: CODECS[codec].decode(CODECS[codec].encode(values), values.shape[1])


KINDS = {
    f"ram-{codec}": Kind(
        lambda *args, codec=codec, **kwargs: RamTable(*args, codec=codec, **kwargs), RamTable.open, through(codec)
    )
    for codec in ("fp32", "bf16", "fp8", "int8", "int4")
}


KINDS |= {
    f"device-{codec}": Kind(
        lambda *args, codec=codec, **kwargs: DeviceTable(*args, codec=codec, device="cpu", **kwargs),
        lambda path, **wanted: DeviceTable.open(path, device="cpu", **wanted),
        through(codec),
    )
    for codec in ("fp32", "bf16", "fp8", "int8", "int4")
}


KINDS |= {
    f"pinned-{codec}": Kind(
        lambda *args, codec=codec, **kwargs: PinnedTable(*args, codec=codec, **kwargs), PinnedTable.open, through(codec)
    )
    for codec in ("fp32", "bf16", "int8")
}


@pytest.fixture(autouse=True)
def nothing_to_lock(monkeypatch):
    """Without a GPU a pinned table is one in RAM."""
    if not torch.cuda.is_available():
        monkeypatch.setattr("byrote.tables.placements.pinned.check_gpu", lambda: None)
        monkeypatch.setattr(PinnedTable, "_lock", lambda table: None)


def logged(base: Table) -> LoggedTable:
    fields = {"moment": (base.width,), "touches": ()}
    return LoggedTable.create(base, Path(tempfile.mkdtemp()), fields, budget=5000)


KINDS |= {
    f"logged-{codec}": Kind(
        lambda *args, codec=codec, **kwargs: logged(RamTable(*args, codec=codec, **kwargs)),
        lambda path, **wanted: logged(RamTable.open(path, **wanted)),
        through(codec),
    )
    for codec in ("fp32", "bf16", "int4")
}


def saved(num_rows: int, width: int, *, codec: str, **kwargs) -> FileTable:
    """The file of a RamTable, opened in place; above a million rows one of zeros, which is a hole."""
    path, size = Path(tempfile.mkdtemp()) / "table", CODECS[codec].record_bytes(width)
    drawn = RamTable(min(num_rows, 10**6), width, codec=codec, **kwargs)
    if num_rows <= 10**6:
        drawn.save(path)
    else:
        dtype = CODECS[codec].dtype
        header = header_of(drawn) | {"num_rows": num_rows}
        stream(path, {"rows": (dtype, (0, size // dtype.itemsize), lambda: iter([]))}, header)
        text = path.read_bytes()[8:].replace(b"[0,0]", b"[0,%d]" % (num_rows * size))
        text = text.replace(b'"shape":[0,', b'"shape":[%d,' % num_rows)
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + num_rows * size)
    table = FileTable.open(path)
    path.unlink()
    return table


KINDS |= {
    f"logged-file-{codec}": Kind(
        lambda *args, codec=codec, **kwargs: logged(saved(*args, codec=codec, **kwargs)),
        lambda path, **wanted: logged(FileTable.open(path, **wanted)),
        through(codec),
    )
    for codec in ("fp32", "bf16", "fp8", "int8", "int4")
}


def laid_over(base: RamTable) -> OverlayTable:
    """An overlay without a row: all that is written lies in it."""
    top = SparseRows(base.num_rows, base.width, digest=base.digest, codec=base.codec)
    return OverlayTable(base, top, writable=True)


KINDS |= {
    f"overlay-{codec}": Kind(
        lambda *args, codec=codec, **kwargs: laid_over(RamTable(*args, codec=codec, **kwargs)),
        lambda path, **wanted: laid_over(RamTable.open(path, **wanted)),
        through(codec),
    )
    for codec in ("fp32", "bf16", "int4")
}


KINDS |= {
    f"sharded-{codec}": Kind(
        lambda *args, codec=codec, **kwargs: ShardedTable.split(RamTable(*args, codec=codec, **kwargs), Ranks()),
        lambda path, **wanted: ShardedTable.open(path, ranks=Ranks(), **wanted),
        through(codec),
    )
    for codec in ("fp32", "bf16", "int4")
}
WANTED = {"num_rows": ROWS, "width": WIDTH, "digest": DIGEST}


@pytest.fixture(params=KINDS)
def kind(request) -> Iterator[Kind]:
    if request.param.startswith("sharded"):  # over a group of one; more are in test_sharded.py
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield KINDS[request.param]
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def table(kind) -> Table:
    return kind.make(ROWS, WIDTH, digest=DIGEST, seed=3)


def every_row(table: Table) -> torch.Tensor:
    return table.read(torch.arange(table.num_rows))


def random_state(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(rows, *shape, generator=generator) for name, shape in FIELDS.items()}


def trained(table: Table) -> Table:
    """A table with some rows written, with state, and two commits."""
    for rows in (torch.tensor([7, 2, 30]), torch.tensor([2, 39])):
        table.write(rows, torch.randn(len(rows), WIDTH), random_state(len(rows)))
        table.commit()
    return table


def test_it_is_a_table(table):
    assert isinstance(table, Table)
    assert (table.num_rows, table.width, table.digest, table.generation) == (ROWS, WIDTH, DIGEST, 0)


@pytest.mark.parametrize("shape", [(0,), (5,), (2, 4), (2, 0, 3), (2, 3, 4)])
def test_read_takes_any_shape(table, shape):
    rows = torch.randint(0, ROWS, shape)
    values = table.read(rows)
    assert values.shape == (*shape, WIDTH) and values.dtype == torch.float32
    assert torch.equal(values, every_row(table)[rows])


def test_what_is_read_is_a_copy(table):
    before = every_row(table)
    every_row(table).zero_()
    assert torch.equal(every_row(table), before)


def test_rows_are_drawn_by_seed(kind):
    first, same, other = (kind.make(2000, 8, digest=DIGEST, std=0.5, seed=seed) for seed in (1, 1, 2))
    values = every_row(first)
    assert torch.equal(values, every_row(same)) and not torch.equal(values, every_row(other))
    assert abs(values.std() - 0.5) < 0.02 and abs(values.mean()) < 0.02


def test_write(kind, table):
    before, rows = every_row(table), torch.tensor([5, 0, 39])
    values = torch.randn(3, WIDTH)
    table.write(rows, values)
    expected = before.clone()
    expected[rows] = kind.stored(values)
    assert torch.equal(every_row(table), expected)
    table.write(rows[:0], values[:0])
    assert torch.equal(every_row(table), expected)


def test_writes_are_counted(table):
    """By tables that may be read while they are written; a write that is refused changes nothing and counts nothing."""
    if not table.apart:
        assert isinstance(table, OverlayTable | ShardedTable)
        return
    before = table.writes
    table.write(torch.tensor([3, 5]), torch.ones(2, WIDTH), random_state(2))
    assert table.writes == before + 1
    with pytest.raises(ValueError):
        table.write(torch.tensor([ROWS]), torch.ones(1, WIDTH))
    assert table.writes == before + 1
    if hasattr(table, "update"):
        rule = LazyAdam()
        fresh = RamTable(ROWS, WIDTH, digest=DIGEST, codec=table.codec)
        fresh.update(rule, torch.tensor([3, 5]), torch.ones(2, WIDTH), 0.1)
        assert fresh.writes >= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(table, bad):
    before = every_row(table)
    with pytest.raises(ValueError, match="row 1 of the 2 given holds a value that is not finite"):
        table.write(torch.tensor([4, 7]), torch.tensor([[1.0] * WIDTH, [1.0, bad, 1.0]]), random_state(2))
    assert torch.equal(every_row(table), before) and table.stats()["rows_touched"] == 0


def test_stochastic_rounding_follows_the_generation(tmp_path):
    """Equal writes at equal generations round alike, also in a table that was saved and opened between."""
    rows, values = torch.arange(ROWS), torch.randn(ROWS, WIDTH)
    tables = [RamTable(ROWS, WIDTH, digest=DIGEST, codec="bf16-stochastic") for _ in range(2)]
    tables[1].save(tmp_path / "table")
    tables[1] = RamTable.open(tmp_path / "table", **WANTED)
    written = []
    for _ in range(2):
        for table in tables:
            table.write(rows, values)
            table.commit()
        assert torch.equal(every_row(tables[0]), every_row(tables[1]))
        written.append(every_row(tables[0]))
    assert not torch.equal(*written)
    assert bool(((written[0] - values).abs() <= CODECS["bf16-stochastic"].bound(values)[:, None]).all())


def test_a_packed_file_holds_records(tmp_path):
    table = RamTable(ROWS, WIDTH, digest=DIGEST, codec="fp8")
    table.save(tmp_path / "table")
    with safe_open(tmp_path / "table", framework="pt") as file:
        header, records = json.loads(file.metadata()["byrote"]), file.get_tensor("rows")
    assert (header["codec"], header["width"], records.dtype) == ("fp8", WIDTH, torch.uint8)
    assert torch.equal(CODECS["fp8"].decode(records, WIDTH), every_row(table))


def test_state_is_zero_where_none_was_written(table):
    rows = torch.tensor([4, 1])
    state = table.read_state(rows, FIELDS)
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "moment": (2, WIDTH),
        "touches": (2,),
    }
    assert not any(value.any() for value in state.values())
    assert table.stats()["rows_touched"] == 0


def test_state_of_touched_rows_only(kind):
    """Against a dictionary, over many writes that overlap, so that the store grows several times."""
    table = kind.make(5000, WIDTH, digest=DIGEST)
    expected: dict[int, dict[str, torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        rows = torch.randperm(5000, generator=generator)[: 20 + 60 * step]
        state = random_state(len(rows), seed=step)
        table.write(rows, torch.zeros(len(rows), WIDTH), state)
        for i, row in enumerate(rows.tolist()):
            expected[row] = {name: value[i] for name, value in state.items()}
    read = table.read_state(torch.arange(5000), FIELDS)
    nothing = {name: torch.zeros(shape) for name, shape in FIELDS.items()}
    for name in FIELDS:
        assert torch.equal(read[name], torch.stack([expected.get(row, nothing)[name] for row in range(5000)]))
    assert 1024 < table.stats()["rows_touched"] == len(expected) < 5000


def test_state_memory_follows_the_touched_rows(kind):
    table = kind.make(200_000, 64, digest=DIGEST)
    rows = torch.arange(100) * 7
    table.write(rows, torch.zeros(100, 64), {"moment": torch.ones(100, 64), "touches": torch.ones(100)})
    assert table.stats()["state_bytes"] < 4 * 200_000 * 64 / 16


def test_a_write_without_state_keeps_the_state(table):
    rows, state = torch.tensor([3, 8]), random_state(2)
    table.write(rows, torch.zeros(2, WIDTH), state)
    table.write(rows, torch.ones(2, WIDTH))
    for name, value in table.read_state(rows, FIELDS).items():
        assert torch.equal(value, state[name])


def test_commit_counts_generations(table):
    assert [table.commit(), table.commit()] == [1, 2]
    assert table.generation == table.stats()["generation"] == 2


def test_save_and_open(kind, table, tmp_path):
    path = tmp_path / "table"
    trained(table).save(path)
    opened = kind.open(path, **WANTED)
    assert torch.equal(every_row(opened), every_row(table))
    assert opened.generation == table.generation == 2
    opened.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "table"]  # no temporary file stays
    opened.write(torch.tensor([0]), torch.ones(1, WIDTH))  # an opened table can be trained on,
    assert (tmp_path / "again").read_bytes() == path.read_bytes()  # which leaves its file as it was
    opened.save(path)
    assert torch.equal(every_row(kind.open(path, **WANTED)), every_row(opened))


def test_save_and_load_state(kind, table, tmp_path):
    rows, state = tmp_path / "rows", tmp_path / "state"
    trained(table).save(rows)
    table.save_state(state)
    opened = kind.open(rows, **WANTED)
    opened.write(torch.tensor([11]), torch.zeros(1, WIDTH), random_state(1))  # what is there is replaced
    values = every_row(opened)
    opened.load_state(state)
    everything = torch.arange(ROWS)
    for name, value in table.read_state(everything, FIELDS).items():
        assert torch.equal(opened.read_state(everything, FIELDS)[name], value)
    assert torch.equal(every_row(opened), values)
    assert opened.stats()["rows_touched"] == 4
    opened.save_state(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == state.read_bytes()


def test_state_of_an_untouched_table(kind, table, tmp_path):
    table.save_state(tmp_path / "state")
    trained(other := kind.make(ROWS, WIDTH, digest=DIGEST))
    other.generation, other.identity = 0, table.identity
    other.load_state(tmp_path / "state")
    assert other.stats()["rows_touched"] == 0
    assert not other.read_state(torch.arange(ROWS), FIELDS)["moment"].any()


def test_a_table_trains_after_its_empty_state_was_saved(table, tmp_path):
    """Before the first step a checkpoint holds no state; that must not settle which state there will be."""
    table.save_state(tmp_path / "state")
    rows, state = torch.tensor([7, 2]), random_state(2)
    table.write(rows, torch.ones(2, WIDTH), state)
    assert all(torch.equal(table.read_state(rows, FIELDS)[name], value) for name, value in state.items())


def test_the_order_of_training_does_not_show_in_the_state_file(kind, tmp_path):
    first, second = (kind.make(ROWS, WIDTH, digest=DIGEST) for _ in range(2))
    rows, state = torch.tensor([9, 4, 25]), random_state(3)
    first.write(rows, torch.zeros(3, WIDTH), state)
    second.write(rows.flip(0), torch.zeros(3, WIDTH), {name: value.flip(0) for name, value in state.items()})
    first.save_state(tmp_path / "first")
    second.save_state(tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize("with_state_before", [True, False])
def test_a_copy_and_its_original_go_their_own_ways(kind, table, tmp_path, with_state_before):
    """Against two tables that never knew of each other: values, rule state, files; the copy of a copy too."""
    tables = [table, *(kind.make(ROWS, WIDTH, digest=DIGEST, seed=3) for _ in range(3))]
    first, others = tables[0], tables[1:]
    for each in tables if with_state_before else ():
        take_step(each, [7, 2, 30], 0)
    second = copy.deepcopy({"tables": [first]})["tables"][0]
    assert second is not first and second.generation == first.generation
    take_step(first, [2, 3], 1)
    take_step(others[0], [2, 3], 1)
    take_step(second, [3, 4, 30], 2)
    take_step(others[1], [3, 4, 30], 2)
    third = copy.deepcopy(second)
    take_step(first, [4, 5], 3)
    take_step(others[0], [4, 5], 3)
    take_step(second, [7, 8], 4)
    take_step(others[1], [7, 8], 4)
    take_step(others[2], [3, 4, 30], 2)
    for mine, twin in zip((first, second, third), others, strict=True):
        assert mine.generation == twin.generation and torch.equal(every_row(mine), every_row(twin))
        states = mine.read_state(torch.arange(ROWS), FIELDS), twin.read_state(torch.arange(ROWS), FIELDS)
        assert all(torch.equal(states[0][name], states[1][name]) for name in FIELDS)
        for each, name in ((mine, "mine"), (twin, "twin")):
            each.save(tmp_path / name)
            each.save_state(tmp_path / f"{name}-state")
        assert torch.equal(every_row(kind.open(tmp_path / "mine", **WANTED)), every_row(twin))
        assert (tmp_path / "mine-state").read_bytes() == (tmp_path / "twin-state").read_bytes()


class Momentum(RowRule):
    """A row rule that keeps FIELDS."""

    def fields(self, width: int) -> dict[str, tuple[int, ...]]:
        return FIELDS

    def update(self, values, state, gradient, rate):
        moment = state["moment"] * 0.5 + gradient
        return values - rate * moment, {"moment": moment, "touches": state["touches"] + 1}


def take_step(table: Table, ids: list[int], seed: int) -> None:
    rows = torch.tensor(ids)
    gradient = torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(seed))
    if isinstance(table, ShardedTable):
        rows, table = table.ranks.local(rows), table.part
    table.update(Momentum(), rows, gradient, 0.1)
    table.commit()


def test_a_copy_keeps_what_load_state_takes_from_its_original(table, tmp_path):
    table.save_state(tmp_path / "none")
    table.write(torch.tensor([7, 2]), torch.randn(2, WIDTH), random_state(2))
    second = copy.deepcopy(table)
    table.load_state(tmp_path / "none")
    kept = second.read_state(torch.tensor([2, 7, 3]), FIELDS)
    assert torch.equal(kept["touches"], torch.cat([random_state(2)["touches"].flip(0), torch.zeros(1)]))
    second.load_state(tmp_path / "none")
    assert not any(value.any() for value in second.read_state(torch.arange(ROWS), FIELDS).values())


def test_a_copy_costs_the_rows_that_change():
    table = RamTable(10**6, 8, digest=DIGEST)
    second = copy.deepcopy(table)
    table.write(torch.arange(100), torch.zeros(100, 8))
    assert second.stats()["overlay_rows"] == 100
    seen = weakref.ref(second)
    del second
    assert seen() is None
    table.write(torch.arange(100), torch.ones(100, 8))  # nobody has to see it any more


def test_pickling_is_refused(table):
    with pytest.raises(TypeError, match="save_pretrained"):
        pickle.dumps(table)


def test_a_module_does_not_own_its_table(kind, table):
    memory = Memory(table)
    before = every_row(table)
    assert set(memory.state_dict()) == {"anchor", "generation", "identity"}
    assert [name for name, _ in memory.named_parameters()] == ["anchor"]
    for move in (memory.half, memory.double, lambda: memory.to(torch.bfloat16)):
        move()
        assert memory.generation.dtype == torch.int64
        assert torch.equal(every_row(table), before)
    assert copy.deepcopy(memory).table is not table
    with pytest.raises(TypeError, match="save_pretrained"):
        pickle.dumps(memory)


BAD_ROWS = {
    "negative": torch.tensor([1, -1]),
    "too large": torch.tensor([1, ROWS]),
    "int32": torch.tensor([1, 2], dtype=torch.int32),
    "float": torch.tensor([1.0, 2.0]),
    "bool": torch.tensor([True, False]),
}


def test_bad_row_ids_are_refused_before_anything_is_written(table):
    trained(table)
    before, state = every_row(table), table.read_state(torch.arange(ROWS), FIELDS)
    calls: dict[str, Callable[[torch.Tensor], object]] = {
        "read": table.read,
        "read_state": lambda rows: table.read_state(rows, FIELDS),
        "write": lambda rows: table.write(rows, torch.ones(2, WIDTH), random_state(2)),
    }
    for (name, rows), (verb, call) in itertools.product(BAD_ROWS.items(), calls.items()):
        with pytest.raises(ValueError, match="row"):
            call(rows)
            pytest.fail(f"{verb} took row ids that are {name}")
    assert torch.equal(every_row(table), before)
    for name, value in table.read_state(torch.arange(ROWS), FIELDS).items():
        assert torch.equal(value, state[name])


BAD_WRITES = {
    "too few values": (torch.ones(1, WIDTH), None),
    "too wide": (torch.ones(2, WIDTH + 1), None),
    "other fields": (torch.ones(2, WIDTH), {"velocity": torch.ones(2, WIDTH)}),
    "a field of another shape": (
        torch.ones(2, WIDTH),
        {"moment": torch.ones(2, WIDTH + 1), "touches": torch.ones(2)},
    ),
    "state of fewer rows": (torch.ones(2, WIDTH), {"moment": torch.ones(1, WIDTH), "touches": torch.ones(1)}),
}


def test_a_bad_write_writes_nothing(table):
    trained(table)
    before, kept = every_row(table), table.read_state(torch.arange(ROWS), FIELDS)
    for name, (values, state) in BAD_WRITES.items():
        with pytest.raises(ValueError):
            table.write(torch.tensor([1, 2]), values, state)
            pytest.fail(f"it took {name}")
    assert torch.equal(every_row(table), before)
    for name, value in table.read_state(torch.arange(ROWS), FIELDS).items():
        assert torch.equal(value, kept[name])


def test_bad_sizes_and_codecs_are_refused():
    for sizes in ((0, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least one"):
            RamTable(*sizes, digest=DIGEST)
    with pytest.raises(ValueError, match="codec must be one of"):
        RamTable(4, 4, digest=DIGEST, codec="fp16")


def rewrite(path: Path, *, arrays=None, **header) -> None:
    """Write a saved file again with something changed; a header field None is left out."""
    with safe_open(path, framework="pt") as file:
        old = json.loads(file.metadata()["byrote"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    merged = {name: value for name, value in {**old, **header}.items() if value is not None}
    save_file(tensors if arrays is None else arrays, path, {"byrote": json.dumps(merged)})


def about(path: Path, text: str) -> None:
    """Give a file this text as its metadata."""
    save_file({"rows": torch.ones(ROWS, WIDTH)}, path, {"byrote": text})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


BAD_FILES = {
    "absent": (Path.unlink, "no such table file"),
    "truncated": (truncate, "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "truncated"),
    "something else": (lambda path: path.write_text("{}" * 50), "truncated or not a (table|safetensors file)"),
    "any safetensors": (
        lambda path: save_file({"rows": torch.ones(ROWS, WIDTH)}, path),
        "no metadata 'byrote'",
    ),
    "metadata that is no JSON": (lambda path: about(path, "{"), "metadata 'byrote' is damaged"),
    "metadata that is a list": (lambda path: about(path, "[]"), "metadata 'byrote' is damaged"),
    "metadata that is too deep": (lambda path: about(path, "[" * 200_000), "metadata 'byrote' is damaged"),
    "a generation in words": (lambda path: rewrite(path, generation="x"), "generation must be int of 0 or more"),
    "a negative generation": (lambda path: rewrite(path, generation=-1), "generation must be int of 0 or more"),
    "rows that are a list": (lambda path: rewrite(path, num_rows=[4]), "num_rows must be int of 0 or more"),
    "a codec that is a list": (lambda path: rewrite(path, codec=["fp32"]), "codec must be str"),
    "no width": (lambda path: rewrite(path, width=0), "holds no rows"),
    "newer": (lambda path: rewrite(path, format_version=2), "format_version 2, this byrote reads 1"),
    "another codec": (lambda path: rewrite(path, codec="fp4"), "codec 'fp4'"),
    "another digest": (lambda path: rewrite(path, digest="e" * 64), "digest is e+, the model needs d+"),
    "no digest": (lambda path: rewrite(path, digest=None), "lacks .'digest'"),
    "no generation": (lambda path: rewrite(path, generation=None), "lacks .'generation'"),
    "more rows": (
        lambda path: rewrite(path, num_rows=ROWS + 1),
        f"num_rows is {ROWS + 1}, the model needs {ROWS}",
    ),
    "wider": (lambda path: rewrite(path, width=WIDTH + 1), "width is 4, the model needs 3"),
    "fewer rows than it says": (
        lambda path: rewrite(path, arrays={"rows": torch.ones(2, WIDTH)}),
        "as its header says",
    ),
    "another dtype": (
        lambda path: rewrite(path, arrays={"rows": torch.ones(ROWS, WIDTH, dtype=torch.float16)}),
        "got torch.float16",
    ),
    "no rows": (lambda path: rewrite(path, arrays={"other": torch.ones(1)}), "no tensor"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("open_table", [RamTable.open, FileTable.open], ids=["read", "in place"])
def test_a_bad_file_is_refused(tmp_path, open_table, spoil, message):
    path = tmp_path / "table"
    RamTable(ROWS, WIDTH, digest=DIGEST).save(path)
    spoil(path)
    with pytest.raises(ValueError, match=message) as error:
        open_table(path, **WANTED)
    assert str(path) in str(error.value)


def test_every_placement_refuses_a_bad_file(kind, table, tmp_path):
    table.save(tmp_path / "table")
    truncate(tmp_path / "table")
    with pytest.raises(ValueError, match=f"{tmp_path / 'table'}.*truncated"):
        kind.open(tmp_path / "table", **WANTED)


BAD_STATES = {
    "absent": (Path.unlink, "no such"),
    "truncated": (truncate, "truncated"),
    "another digest": (lambda path: rewrite(path, digest="e" * 64), "row state has digest"),
    "another moment": (lambda path: rewrite(path, generation=1), "generation 1, the table has 2"),
    "rows only": (lambda path: rewrite(path, arrays={"other": torch.ones(1)}), "rows"),
    "row ids that leave the table": (
        lambda path: rewrite(path, arrays={"rows": torch.tensor([ROWS]), "moment": torch.ones(1, WIDTH)}),
        "leave the table",
    ),
    "a row twice": (
        lambda path: rewrite(path, arrays={"rows": torch.tensor([1, 1]), "moment": torch.ones(2, WIDTH)}),
        "row ids must ascend",
    ),
    "ids in two dimensions": (
        lambda path: rewrite(path, arrays={"rows": torch.tensor([[1]]), "moment": torch.ones(1, WIDTH)}),
        "of row ids",
    ),
    "state in half": (
        lambda path: rewrite(path, arrays={"rows": torch.tensor([1]), "moment": torch.ones(1, WIDTH).half()}),
        "must be float32",
    ),
    "a state that is a number": (
        lambda path: rewrite(path, arrays={"rows": torch.tensor([1]), "moment": torch.tensor(1.0)}),
        "must be float32",
    ),
    "fewer entries than rows": (
        lambda path: rewrite(path, arrays={"rows": torch.tensor([1, 2]), "moment": torch.ones(1, WIDTH)}),
        "moment",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_STATES.values(), ids=BAD_STATES)
@pytest.mark.parametrize("kind", [name for name in KINDS if name.endswith("fp32")], indirect=True)
def test_a_bad_state_file_is_refused_and_changes_nothing(table, tmp_path, spoil, message):
    path = tmp_path / "state"
    trained(table).save_state(path)
    spoil(path)
    kept = table.read_state(torch.arange(ROWS), FIELDS)
    with pytest.raises(ValueError, match=message):
        table.load_state(path)
    for name, value in table.read_state(torch.arange(ROWS), FIELDS).items():
        assert torch.equal(value, kept[name])


def test_nothing_is_drawn_before_it_is_read(kind):
    """A billion rows are named, counted and moved about at no cost."""
    before = virtual_bytes()
    table = kind.make(10**9, 64, digest=DIGEST)
    memory = Memory(table).to(torch.bfloat16)
    copy.deepcopy(memory).state_dict()
    assert table.stats()["bytes"] >= 64 * 10**9 / 2
    assert virtual_bytes() - before < 100 << 20


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
