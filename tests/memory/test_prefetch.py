"""A read that begins early gives what a read at the layer gives, whatever happens in between."""

import gc
import os
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from byrote import EngramConfig, EngramForCausalLM
from byrote.memory import Memory, Sequence, prefetch
from byrote.memory.prefetch import Times
from byrote.memory.sequence import NO_POSITION
from byrote.tables import RamTable
from byrote.tables.files import reads
from byrote.tables.placements.cached import CachedTable
from byrote.tables.placements.file import FileTable
from byrote.tables.placements.logged import LoggedTable

ROWS, WIDTH = 50, 4


class Slow(RamTable):
    """Always cold; a read stops half way until it is let go."""

    def __init__(self, **settings):
        super().__init__(ROWS, WIDTH, digest="", std=1.0, **settings)
        self.go, self.reached, self.reads, self.warmed = threading.Event(), threading.Event(), [], []
        self.go.set()
        self.error: Exception | None = None

    def cold(self, rows):
        return True

    def warm(self, rows):
        self.warmed.append(rows)

    def read(self, rows):
        self.reads.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        flat = rows.reshape(-1)
        first = super().read(flat[: len(flat) // 2])
        self.reached.set()
        assert self.go.wait(10)
        return torch.cat([first, super().read(flat[len(flat) // 2 :])]).view(*rows.shape, WIDTH)


def early(table) -> bool:
    return table.reads[-1].startswith("byrote-prefetch")


def rows_of(*shape, seed=0):
    return torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(seed))


def test_values_and_gradients_are_those_of_a_read_in_place():
    slow, plain = Memory(Slow()), Memory(RamTable(ROWS, WIDTH, digest="", std=1.0))
    taken = []
    for memory in (slow, plain):
        tickets = [memory.ticket(rows_of(2, 5, 3, seed=seed)) for seed in range(3)]  # forwards before backwards
        values = [ticket.wait() for ticket in tickets]
        for part in reversed(values):
            part.square().sum().backward()
        taken.append([*values, *memory.lookup.pending.take(), memory.anchor.grad])
    assert all(torch.equal(a, b) for a, b in zip(*taken, strict=True))
    assert len(slow.table.reads) == 3 and early(slow.table)


def test_the_forward_goes_on_while_it_is_read():
    memory = Memory(Slow())
    memory.table.go.clear()
    ticket = memory.ticket(rows_of(2, 5, 3))  # comes back at once
    assert memory.table.reached.wait(10)
    threading.Timer(0.05, memory.table.go.set).start()
    assert torch.equal(ticket.wait(), RamTable.read(memory.table, ticket.rows).flatten(-2))


def test_waiting_again_reads_again_and_gives_the_same():
    memory = Memory(Slow())
    ticket = memory.ticket(rows_of(2, 5, 3))
    first, second = ticket.wait(), ticket.wait()
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert [name.startswith("byrote-prefetch") for name in memory.table.reads] == [True, False]
    (first + second).sum().backward()
    _, twice = memory.lookup.pending.take()
    memory.ticket(ticket.rows).wait().sum().backward()
    assert torch.equal(twice, 2 * memory.lookup.pending.take()[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_block(reentrant):
    memory, gradients = Memory(Slow()), []
    for recompute in (False, True):
        weight = nn.Parameter(torch.linspace(-1, 1, 3 * WIDTH))
        ticket = memory.ticket(rows_of(2, 5, 3))

        def block(weight, ticket=ticket):
            return (ticket.wait() * weight).sin()

        out = checkpoint(block, weight, use_reentrant=reentrant) if recompute else block(weight)
        out.sum().backward()
        gradients.append([weight.grad, *memory.lookup.pending.take()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_compiled_region_waits():
    memory, other = Memory(Slow()), Memory(Slow(seed=1))
    compiled = torch.compile(lambda ticket, weight: (ticket.wait() * weight).sin(), fullgraph=True, backend="aot_eager")
    weight = torch.linspace(-1, 1, 3 * WIDTH)
    for seed, used in enumerate((memory, other, memory)):
        ticket = used.ticket(rows_of(2, 5 + seed, 3, seed=seed))
        expected = (RamTable.read(used.table, ticket.rows).flatten(-2) * weight).sin()
        torch.testing.assert_close(compiled(ticket, weight), expected)
        assert ticket.reading._job is None
    assert all(name.startswith("byrote-prefetch") for name in memory.table.reads + other.table.reads)


def test_what_a_write_overtakes_is_read_again():
    """The wait gives the rows as they are at the wait, and never some from before a write and some from after."""
    memory, ids = Memory(Slow()), torch.arange(ROWS).view(1, ROWS, 1)
    table = memory.table
    table.go.clear()
    ticket = memory.ticket(ids)
    assert table.reached.wait(10)  # half of the rows are read
    new = 5 + torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    table.write(torch.arange(ROWS), new)
    table.go.set()
    torn = ticket.reading._job.result()[0].view(ROWS, WIDTH)
    assert not torch.equal(torn, new) and torch.equal(torn[ROWS // 2 :], new[ROWS // 2 :])
    assert torch.equal(ticket.wait().view(ROWS, WIDTH), new)


def test_an_error_comes_up_at_the_wait():
    memory = Memory(Slow())
    memory.table.error = ValueError("the file is truncated: copy it again")
    ticket = memory.ticket(rows_of(1, 2, 3))
    for _ in range(2):
        with pytest.raises(ValueError, match="the file is truncated: copy it again"):
            ticket.wait()
    memory.table.error = None
    assert memory.ticket(rows_of(1, 2, 3)).wait().shape == (1, 2, 3 * WIDTH)


def test_a_ticket_that_nobody_waits_for_leaves_nothing():
    memory = Memory(Slow())
    tickets = [memory.ticket(rows_of(1, 2, 3)) for _ in range(20)]
    kept = [weakref.ref(ticket.reading) for ticket in tickets] + [weakref.ref(ticket.rows) for ticket in tickets]
    assert len(memory.lookup._readings) == 20
    for ticket in tickets:
        ticket.reading._job.result()
    del tickets, ticket
    prefetch._pool(prefetch.os.getpid()).submit(int).result()  # a thread lets go of a job when it takes the next
    prefetch._pool(prefetch.os.getpid()).submit(int).result()
    gc.collect()
    assert not len(memory.lookup._readings) and sum(ref() is not None for ref in kept) <= prefetch.THREADS


def test_what_is_in_memory_or_cannot_be_read_apart_is_read_in_place():
    rows = rows_of(1, 2, 3)
    together = Slow()
    together.apart = False
    for table in (RamTable(ROWS, WIDTH, digest=""), together):
        ticket = Memory(table).ticket(rows)
        assert ticket.reading is None and torch.equal(ticket.wait(), table.read(rows).flatten(-2))
    assert Memory(Slow()).ticket(rows[:, :0]).reading is None


def test_the_share_of_read_time_that_is_hidden():
    times = Times()
    assert times.hidden == 0
    times.add(2.0, 0.5)
    times.add(2.0, 7.0)  # it stood in a queue
    assert times.hidden == 1 - 2.5 / 4
    memory = Memory(Slow())
    ticket = memory.ticket(rows_of(1, 2, 3))
    ticket.reading._job.result()
    ticket.wait()
    stats = memory.lookup.stats()
    assert stats["num_rows"] == ROWS and 0 < stats["hidden"] <= 1
    assert stats["hidden"] == 1 - stats["waited_seconds"] / stats["read_seconds"]
    before = stats["waited_seconds"]
    ticket.wait()  # in place: all of it is waited for
    after = memory.lookup.stats()
    assert after["waited_seconds"] - before == pytest.approx(after["read_seconds"] - stats["read_seconds"])


def test_warming_is_time_that_nobody_waits_for():
    memory, rows = Memory(Slow()), rows_of(1, 2, 3)
    prefetch.warm(memory.table, rows, memory.lookup.times)
    assert memory.table.warmed == [rows] and memory.lookup.times.read > 0 and memory.lookup.times.hidden == 1


@pytest.fixture
def path(tmp_path):
    RamTable(ROWS, WIDTH, digest="", std=1.0).save(tmp_path / "table")
    return tmp_path / "table"


def tables_over(path, folder):
    """A file, a log over it with a row in its buffer and one in a segment, a cache over it with a row."""
    logged = LoggedTable.create(FileTable.open(path), folder / "log", {"moment": ()})
    for row in (5, 7):
        logged.write(torch.tensor([row]), torch.ones(1, WIDTH))
        if row == 5:
            logged.log.commit(1)
    cached = CachedTable(FileTable.open(path), 10_000)
    cached.read(torch.tensor([7]))
    return {"file": FileTable.open(path), "logged": logged, "cached": cached}


def test_tables_tell_whether_rows_are_cold(path, tmp_path, monkeypatch):
    tables, rows = tables_over(path, tmp_path), torch.tensor([[7, 8], [9, 7]])
    for resident in (True, False):
        monkeypatch.setattr(reads, "resident", lambda fd, places, size, r=resident: r or not len(places))
        for name, table in tables.items():
            assert table.cold(rows) is not resident
            assert (Memory(table).ticket(rows).reading is None) is resident
            assert table.cold(torch.tensor([7])) is (name == "file" and not resident)
            assert table.cold(torch.tensor([5])) is not resident
            with pytest.raises(ValueError, match="leave the table"):
                table.cold(torch.tensor([ROWS]))


@pytest.mark.parametrize("most", [1, 10**6])
def test_tables_warm_rows_and_change_nothing(path, tmp_path, monkeypatch, most):
    tables, read, original = tables_over(path, tmp_path), Counter(), reads.read

    def noted(files, places, out):
        [(file, number)] = files
        read[Path(os.readlink(f"/dev/fd/{file}")).name] += number
        original(files, places, out)
        if number and out.shape[1] == 4 * WIDTH:
            values.extend(out.view(np.float32)[:, 0].tolist())

    monkeypatch.setattr(reads, "WARM_BYTES", most)
    monkeypatch.setattr(reads, "read", noted)
    rows = RamTable.open(path, num_rows=ROWS, width=WIDTH, digest="").rows[:, 0]
    for name, table in tables.items():
        before, values = table.stats(), []
        read.clear()
        table.warm(torch.tensor([[7, 30], [5, 30], [9, 30]]))
        wanted = {"file": [5, 7, 9, 30], "logged": [9, 30], "cached": [5, 9, 30]}[name]
        assert values == rows[wanted].tolist()
        assert read == Counter({"table": len(wanted)} | ({"000001.log": 1} if name == "logged" else {}))
        assert table.stats() == before


def test_a_log_is_warmed_while_others_read_and_collect(path, tmp_path, monkeypatch):
    """Nobody waits for the disk, and a segment that is removed meanwhile stays readable."""
    table = LoggedTable.create(FileTable.open(path), tmp_path / "log", {"moment": ()}, segment_bytes=1)
    table.write(torch.tensor([5]), torch.ones(1, WIDTH))
    table.log.commit(1)
    original = reads.warm

    def slow(file, places, size):
        def other():
            table.write(torch.tensor([5]), torch.zeros(1, WIDTH))
            table.log.commit(2)
            table.log.collect([])
            assert not (tmp_path / "log" / "000001.log").exists()
            return table.read(torch.tensor([5]))

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(other).result(10)[0, 0] == 0
        original(file, places, size)
        opened.append(len(os.listdir("/dev/fd")))

    monkeypatch.setattr(reads, "warm", slow)
    opened = []
    table.log.warm(np.array([5]))
    assert opened == [len(os.listdir("/dev/fd")) + 1]


def test_a_log_is_read_and_written_on_two_threads(path, tmp_path):
    """The written rows all hold one number: a read that saw half of a write would hold two."""
    table = LoggedTable.create(FileTable.open(path), tmp_path / "log", {"moment": ()}, budget=2000)
    ids, wrong, stop = torch.arange(ROWS), [], threading.Event()
    table.write(ids, torch.zeros(ROWS, WIDTH))

    def read():
        while not stop.is_set():
            values = table.read(ids)
            if len(values.unique()) != 1:
                wrong.append(values)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(300):
        table.write(ids, torch.full((ROWS, WIDTH), float(number)))
        if number % 50 == 0:
            table.log.commit(number + 1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and table.writes == 301


def test_warming_a_batch_takes_the_rows_of_its_forward(monkeypatch):
    """Of packed documents too; and all of them, whatever the layer."""
    config = EngramConfig.from_preset("nano", memory_layers=[0, 1], memory_table_sizes=[31, 37])
    stack = EngramForCausalLM(config).memory_stack
    ids = torch.randint(3, 512, (3, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(7), torch.arange(13)]).expand(3, 20)
    warmed = []
    for _, memory in stack.items():
        monkeypatch.setattr(memory.table, "cold", lambda rows: True, raising=False)
        monkeypatch.setattr(memory.table, "warm", warmed.append, raising=False)
    stack.warm(ids, positions)
    sequence = Sequence.place(positions, torch.ones_like(ids) > 0, 0, ids[:, :1] * 0 + NO_POSITION, ids[:, :1] * 0)
    tickets = stack(ids, sequence, None)
    assert len(warmed) == 2 and all(torch.equal(rows, t.rows) for rows, t in zip(warmed, tickets.values(), strict=True))
    read, waited = stack.read_times()
    assert read > 0 and waited == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_every_table_is_read_early():
    memory = Memory(RamTable(ROWS, WIDTH, digest="", std=1.0))
    rows = rows_of(2, 5, 3)
    memory.cuda()
    dropped, ticket = memory.ticket(rows.cuda() + 0), memory.ticket(rows.cuda())
    assert dropped.reading is not None and ticket.reading is not None
    values, again = ticket.wait(), ticket.wait()
    expected = memory.table.read(rows).flatten(-2)
    assert values.is_cuda and torch.equal(values.cpu(), expected) and torch.equal(again.cpu(), expected)
    values.sum().backward()
    touched, gradient = memory.lookup.pending.take()
    assert torch.equal(touched.cpu(), rows.unique()) and gradient.is_cuda
    late = memory.ticket(rows.cuda())
    late.reading._job.result()
    memory.table.write(torch.arange(ROWS), torch.ones(ROWS, WIDTH))
    assert torch.equal(late.wait().cpu(), torch.ones(2, 5, 3 * WIDTH))
