"""RowLog: against a dictionary, over many commits, and after a crash at any point."""

import errno
import os
import random
import shutil
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.tables.files import reads
from byrote.tables.log import disk, manifests
from byrote.tables.log.log import RowLog
from tests.processes import forked
from tests.tables.log_writer import BYTES, ROWS, SMALL, change, content, run, write_on


def create(folder: Path, **settings) -> RowLog:
    return RowLog.create(folder, num_rows=ROWS, record_bytes=BYTES, digest="d", **{**SMALL, **settings})


def test_what_is_written_is_read_and_the_rest_is_not_there(tmp_path):
    log = create(tmp_path)
    ids, records = change(0)
    log.write(ids, records)
    found, read = log.read(np.arange(ROWS))
    assert np.array_equal(np.flatnonzero(found), np.sort(ids)) and len(log) == len(ids)
    assert np.array_equal(read[ids], records) and not read[~found].any()
    assert np.array_equal(log.read(ids[:5], 7)[1], records[:5, :7])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 150), st.integers(0, 9)), max_size=25))
def test_it_is_a_dictionary_and_its_generations_stay_readable(tmp_path_factory, steps):
    """One write a step; then, by the last number: nothing, a commit, a commit and a collection, a reopening."""
    folder = tmp_path_factory.mktemp("log")
    log, twin = create(folder), np.zeros((ROWS, BYTES), np.uint8)
    states = {0: twin.copy()}
    for seed, count, then in steps:
        rng = np.random.default_rng(seed)
        ids, records = rng.choice(ROWS, count, replace=False), rng.integers(0, 256, (count, BYTES), np.uint8)
        log.write(ids, records)
        twin[ids] = records
        if then >= 4:
            log.commit(max(states) + 1)
            states[max(states) + 1] = twin.copy()
        if then >= 6:
            keep = {generation for generation in states if rng.random() < 0.5} | {max(states)}
            log.collect(keep)
            states = {generation: states[generation] for generation in keep}
        if then >= 8:
            log.close()
            log = RowLog.open(folder, **SMALL)
        assert np.array_equal(log.read(np.arange(ROWS))[1], twin)
    assert log.generations() == sorted(states)
    log.close()
    for generation, state in states.items():
        reader = RowLog.open(folder, generation, lock=False)
        assert np.array_equal(reader.read(np.arange(ROWS))[1], state)
        reader.close()


def test_disk_follows_the_rows_and_not_the_steps(tmp_path):
    log, sizes, most = create(tmp_path), [], 0
    for step in range(300):
        before = sum(log._live.written.values())
        log.write(*change(step))
        log.commit(step + 1)
        most = max(most, sum(log._live.written.values()) - before)
        log.collect({step, step + 1})
        sizes.append(log.disk_bytes())
    assert len(log) == ROWS
    # Twice the rows, what the kept generation before needs, and segments that are not full or just half dead.
    assert max(sizes) < 5 * ROWS * (BYTES + 8)
    assert max(sizes[200:]) <= 1.2 * max(sizes[50:100])
    assert most <= 40 + SMALL["segment_bytes"] // BYTES  # records a commit wrote: those of the step, and one segment


def test_memory_is_bounded_and_a_commit_writes_what_is_dirty(tmp_path):
    log = RowLog.create(tmp_path, num_rows=10**6, record_bytes=100, digest="d", budget=100_000)
    assert log._dirty.records.nbytes < 100_000
    ids = np.arange(50_000)
    log.write(ids, np.ones((50_000, 100), np.uint8))  # far more than the buffer holds
    log.commit(1)
    before = log.disk_bytes()
    log.write(ids[:10], np.zeros((10, 100), np.uint8))
    log.commit(2)
    assert log.disk_bytes() - before < 10 * 108 + 400
    assert log.read(ids)[1].sum() == 100 * (50_000 - 10)


def test_memory_follows_the_rows_and_not_the_table(tmp_path):
    log = RowLog.create(tmp_path, num_rows=10**15, record_bytes=8, digest="d", budget=10_000)
    ids = np.random.default_rng(0).integers(0, 10**15, 20_000)
    log.write(np.unique(ids), np.zeros((len(np.unique(ids)), 8), np.uint8))
    assert log._live._places.num_bytes + log._dirty.records.nbytes < 33 * 20_000 + 10_000


@pytest.mark.parametrize("resident", [True, False])
def test_cold_and_warm_records_are_the_same_bytes(tmp_path, monkeypatch, resident):
    monkeypatch.setattr(reads, "resident", lambda *_: resident)
    log = create(tmp_path, budget=500)
    run(log, 21)
    assert content(log) == state_after(21) and len(log._segments.reads.files) > 2
    twice = np.random.default_rng(0).integers(0, ROWS, 3 * ROWS)
    for size in (1, 7, BYTES):
        found, records = log.read(twice, size)
        assert np.array_equal(records, log.read(np.arange(ROWS), size)[1][twice]) and found.any()
    segment = min(log._live.segments())
    os.truncate(tmp_path / f"{segment:06d}.log", 20)
    with pytest.raises(ValueError, match=rf"segment {segment} ends at byte 20, .*which generation 21 needs"):
        log.read(twice)


def writer(folder: Path, steps: int) -> tuple[BaseProcess, Connection]:
    told, tell = forked.Pipe(duplex=False)
    process = forked.Process(target=write_on, args=(folder, steps, tell))
    process.start()
    tell.close()
    return process, told


def kill_at_random(folder: Path, kills: int, steps: int) -> None:
    """Kill the writer `kills` times, each time after it came a little way; then let it finish."""
    rng = random.Random(0)
    for _ in range(kills):
        process, told = writer(folder, steps)
        assert told.recv() == "ready"
        time.sleep(rng.random() * 0.15)
        process.kill()
        process.join()
        reader = RowLog.open(folder, lock=False)
        assert reader.generation < steps and content(reader) == state_after(reader.generation)
        reader.close()
    process, _ = writer(folder, steps)
    process.join()
    assert process.exitcode == 0


def state_after(steps: int) -> bytes:
    """The uninterrupted run, in memory."""
    found, rows = np.zeros(ROWS, bool), np.zeros((ROWS, BYTES), np.uint8)
    for step in range(steps):
        ids, records = change(step)
        rows[ids] += records
        found[ids] = True
    return found.tobytes() + rows.tobytes()


@pytest.mark.parametrize("kills", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    kill_at_random(tmp_path, kills, 40 * kills)
    log = RowLog.open(tmp_path)
    assert log.generation == 40 * kills and content(log) == state_after(40 * kills)


class Crash(BaseException):
    pass


def crashing(after: int, torn: bool = False, error: BaseException | None = None) -> SimpleNamespace:
    """`os`, of which the operation number `after` that changes the disk fails, half done if torn."""
    left = [after]

    def wrap(name):
        real = getattr(os, name)

        def operation(*args):
            left[0] -= 1
            if left[0] < 0:
                if torn and name == "pwrite":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                raise error or Crash
            return real(*args)

        return operation

    names = {name: getattr(os, name) for name in dir(os)}
    changes = ("pwrite", "fsync", "replace", "unlink", "truncate")
    return SimpleNamespace(**{**names, **{name: wrap(name) for name in changes}}, left=left)


@pytest.mark.parametrize("torn", [False, True])
def test_a_crash_at_every_operation(tmp_path, monkeypatch, torn):
    start = tmp_path / "start"
    log = create(start)
    run(log, 30)
    log.close()
    for after in range(10_000):
        folder = tmp_path / "crashed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        with monkeypatch.context() as patch:
            patch.setattr(disk, "os", crashing(after, torn))
            committed, log = 30, None
            try:
                log = RowLog.open(folder, **SMALL)
                run(log, 36)
                break
            except Crash:
                if log is not None:
                    committed = log.generation
        if log is not None:
            log.close()
        log = RowLog.open(folder, **SMALL)
        # A manifest may be in place though the call that wrote it did not come to its end.
        assert log.generation in (committed, committed + 3) and content(log) == state_after(log.generation)
        run(log, 36)
        assert content(log) == state_after(36)
        log.close()
    assert after > 20


def test_a_full_disk_leaves_the_last_commit(tmp_path, monkeypatch):
    log = create(tmp_path)
    run(log, 6)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "os", crashing(1, True, OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            run(log, 9)
    with pytest.raises(ValueError, match="open it again"):
        log.commit(9)
    log.close()
    log = RowLog.open(tmp_path, **SMALL)
    assert log.generation == 6 and content(log) == state_after(6)


def test_torn_and_garbage_tails_do_not_count_and_torn_commits_are_found(tmp_path):
    log = create(tmp_path / "log")
    run(log, 3)
    segment, length = manifests.read(tmp_path / "log", 3)[-1]
    log.write(*change(3))
    log._flush()  # written behind, not committed
    log.close()
    path = Path(f"{segment:06d}.log")
    whole = (tmp_path / "log" / path).read_bytes()
    tails = [whole[length:cut] for cut in range(length, len(whole))] + [os.urandom(n) for n in (1, 16, 500)]
    for tail in tails:
        (tmp_path / "log" / path).write_bytes(whole[:length] + tail)
        log = RowLog.open(tmp_path / "log", **SMALL)
        assert content(log) == state_after(3)
        log.close()
    for cut in range(0, length, 7):
        (tmp_path / "log" / path).write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"{path.name}: the block at byte .* damaged"):
            RowLog.open(tmp_path / "log", lock=False)
    for at in range(0, length, 7):
        (tmp_path / "log" / path).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 : length])
        with pytest.raises(ValueError, match=f"{path.name}: the block at byte .* damaged.*restore the file"):
            RowLog.open(tmp_path / "log", lock=False)


def test_what_it_refuses(tmp_path):
    log = create(tmp_path)
    run(log, 6)
    for call, message in (
        (lambda: create(tmp_path), "holds a log already"),
        (lambda: RowLog.open(tmp_path), "open for writing in another process"),
        (lambda: RowLog.open(tmp_path, 5, lock=False), r"no generation 5; committed are \[3, 6\]"),
        (lambda: RowLog.open(tmp_path, digest="e", lock=False), "digest is d, asked for is e"),
        (lambda: RowLog.open(tmp_path, record_bytes=9, lock=False), "record_bytes is 24"),
        (lambda: RowLog.open(tmp_path / "none", lock=False), "no log"),
        (lambda: log.write(np.array([ROWS]), np.zeros((1, BYTES), np.uint8)), "leave the table"),
        (lambda: log.write(np.array([1]), np.zeros((1, 3), np.uint8)), "records must be"),
        (lambda: log.write(np.array([2]), np.zeros((1, BYTES), np.uint8)) or log.commit(3), "committed already"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    reader = RowLog.open(tmp_path, lock=False)
    with pytest.raises(ValueError, match="opened for reading"):
        reader.write(*change(0))
    log.close()
    next(tmp_path.glob("*.log")).unlink()
    with pytest.raises(ValueError, match="is missing, which generation"):
        RowLog.open(tmp_path)
