"""Gather and accumulate against a dense embedding; and nothing the size of a table is ever made."""

import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from byrote.memory.lookup import Lookup, Ticket, accumulate, gather
from byrote.tables import RamTable
from byrote.tables.records import sum_rows

ROWS, WIDTH = 30, 4


def make(seed=0) -> tuple[Lookup, torch.nn.Parameter]:
    return Lookup(RamTable(ROWS, WIDTH, digest="", std=1.0, seed=seed)), torch.nn.Parameter(torch.zeros(1))


def random_rows(*shape, seed=0):
    """Few enough rows that most occur more than once."""
    return torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(seed))


def loss_of(values):
    weights = torch.linspace(-1, 2, values.numel()).view_as(values)
    return (values.square() * weights).sum() + (values.flatten(1).sum(1) ** 3).sum()


@pytest.mark.parametrize("shape", [(7,), (2, 9, 3), (1, 40, 2), (2, 0, 3)])
def test_against_a_dense_embedding(shape):
    lookup, anchor = make()
    dense = lookup.table.rows.clone().requires_grad_()
    rows = random_rows(*shape)
    values, expected = gather(anchor, rows, lookup.handle), F.embedding(rows, dense)
    assert torch.equal(values, expected)
    loss_of(values).backward()
    loss_of(expected).backward()
    assert torch.equal(anchor.grad, torch.zeros(1))
    if rows.numel():
        touched, gradient = lookup.pending.take()
        assert torch.equal(touched, rows.unique())
        torch.testing.assert_close(gradient, dense.grad[touched], atol=1e-5, rtol=1e-5)
    assert lookup.pending.take() is None


def test_backwards_add_up():
    lookup, anchor = make()
    dense = lookup.table.rows.clone().requires_grad_()
    tickets = [Ticket(random_rows(2, 5, 3, seed=seed), anchor, lookup) for seed in range(3)]
    losses = [loss_of(ticket.wait()) for ticket in tickets]  # all forwards, then all backwards, in another order
    for loss in reversed(losses):
        loss.backward()
    for ticket in tickets:
        loss_of(F.embedding(ticket.rows, dense).flatten(-2)).backward()
    touched, gradient = lookup.pending.take()
    torch.testing.assert_close(gradient, dense.grad[touched], atol=1e-5, rtol=1e-5)


def test_a_ticket_can_be_waited_for_twice():
    lookup, anchor = make()
    ticket = Ticket(random_rows(2, 5, 3), anchor, lookup)
    first, second = ticket.wait(), ticket.wait()
    assert first.shape == (2, 5, 3 * WIDTH) and torch.equal(first, second)
    (first + second).sum().backward()
    _, twice = lookup.pending.take()
    Ticket(ticket.rows, anchor, lookup).wait().sum().backward()
    _, once = lookup.pending.take()
    assert torch.equal(twice, 2 * once)


def test_a_row_with_no_gradient_is_not_touched():
    """What padding reads, and what the last token of a row reads, has no effect: its row must not age."""
    lookup, anchor = make()
    values = gather(anchor, torch.tensor([3, 5, 3, 8]), lookup.handle)
    (values * torch.tensor([1.0, 0, -1, 2])[:, None]).sum().backward()
    touched, gradient = lookup.pending.take()
    assert touched.tolist() == [8] and torch.equal(gradient, torch.full((1, WIDTH), 2.0))
    (gather(anchor, torch.tensor([3, 5]), lookup.handle) * 0).sum().backward()
    assert lookup.pending.take() is None


def test_a_frozen_anchor_reads_and_leaves_nothing():
    lookup, anchor = make()
    anchor.requires_grad_(False)
    weight = torch.ones(WIDTH, requires_grad=True)
    (gather(anchor, random_rows(6), lookup.handle) * weight).sum().backward()
    assert weight.grad is not None and lookup.pending.take() is None


def test_half_precision_gradients_are_summed_in_float32():
    lookup, anchor = make()
    rows = torch.zeros(1000, dtype=torch.int64)
    gather(anchor, rows, lookup.handle).to(torch.bfloat16).sum().backward()
    _, gradient = lookup.pending.take()
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full((1, WIDTH), 1000.0))  # a bfloat16 sum would stop at 256


def test_no_double_backward():
    lookup, anchor = make()
    values = gather(anchor, random_rows(6), lookup.handle)
    (gradient,) = torch.autograd.grad(values.square().sum(), anchor, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        gradient.sum().backward()


def test_opcheck():
    lookup, anchor = make()
    torch.library.opcheck(gather, (anchor, random_rows(2, 5, 3), lookup.handle))
    torch.library.opcheck(accumulate, (torch.randn(2, 5, 3, WIDTH), random_rows(2, 5, 3), lookup.handle))


def test_a_compiled_function_equals_eager():
    """Also when it meets a second table: the handle, an integer, must not become a symbol."""

    def function(anchor, rows, handle, weight):
        return (gather(anchor, rows, handle).flatten(-2) * weight).sin().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        results = []
        for call in (function, compiled):
            lookup, anchor = make(seed)
            weight = torch.linspace(0, 1, 3 * WIDTH, requires_grad=True)
            loss = call(anchor, random_rows(2, 5 + seed, 3), lookup.handle, weight)
            loss.backward()
            results.append((loss, anchor.grad, weight.grad, *lookup.pending.take()))
        torch.testing.assert_close(*results)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.integers(0, 12), max_size=40), seed=st.integers(0, 2**31))
def test_sum_rows(rows, seed):
    ids = torch.tensor(rows, dtype=torch.int64)
    gradient = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(seed))
    unique, sums, _ = sum_rows(ids, gradient)
    assert unique.tolist() == sorted(set(rows))
    dense = torch.zeros(13, 3).index_add(0, ids, gradient)
    torch.testing.assert_close(sums, dense[unique], atol=1e-5, rtol=1e-5)
    again = sum_rows(ids, gradient)
    assert torch.equal(unique, again[0]) and torch.equal(sums, again[1])


def test_sums_run_in_the_order_of_occurrence():
    """Bit for bit what a loop gives, with numbers whose sum depends on the order."""
    gradient = torch.tensor([1e8, 1.0, -1e8, 1.0, 3.0, 0.5])[:, None].expand(-1, WIDTH).contiguous()
    ids = torch.tensor([4, 4, 4, 4, 0, 0])
    _, sums, _ = sum_rows(ids, gradient)
    expected = torch.zeros(2, WIDTH)
    for row, value in zip((1, 1, 1, 1, 0, 0), gradient, strict=True):
        expected[row] += value
    assert torch.equal(sums, expected)


def test_lookups_do_not_outlive_their_model():
    from byrote.memory import lookup as module

    before = len(module._lookups)
    kept = [make()[0] for _ in range(3)]
    assert len(module._lookups) == before + 3
    kept.clear()
    gc.collect()
    assert len(module._lookups) <= before


TABLE_BYTES = 2**20 * 64 * 4  # 256 MiB, in its own process: a peak is not undone


def test_nothing_the_size_of_a_table_is_made():
    done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def train_beside_a_large_table() -> None:
    from byrote import EngramConfig, EngramForCausalLM
    from byrote.train.optimizer import Optimizer

    torch.set_num_threads(1)
    config = EngramConfig.from_preset("nano", memory_table_sizes=[2**18, 2**18], memory_heads=2, memory_row_width=64)
    imported = peak_bytes()
    model = EngramForCausalLM(config).train()
    assert peak_bytes() - imported < TABLE_BYTES / 4, "building the model must not draw the table"
    optimizer = Optimizer(model)
    (memory,) = (memory for _, memory in model.model.memories.items())
    assert memory.table.stats()["bytes"] > TABLE_BYTES
    memory.table.read(torch.zeros(1, dtype=torch.int64))
    ids = torch.randint(3, 512, (2, 32))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        tensors = [p.grad for p in model.parameters() if p.grad is not None]
        optimizer.zero_grad()
        tensors += [*model.parameters(), *model.buffers()]
        tensors += [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        return tensors

    before = peak_bytes()
    for _ in range(3):
        tensors = step()
    grown = peak_bytes() - before
    # The directory of the row state takes four bytes a row, 1/64 of this table; the rest is a small model's.
    assert grown < TABLE_BYTES / 4, f"three steps took {grown / 2**20:.0f} MiB beside a table of 256"
    largest = max(tensor.numel() for tensor in tensors)
    assert largest <= 512 * 64, f"a tensor of {largest} elements: the embedding is the largest that may be"
    assert {tuple(p.shape) for p in (memory.anchor, memory.generation)} == {(1,)}
    assert not any(tensor.is_sparse for tensor in tensors)
    stats = memory.table.stats()
    assert 0 < stats["rows_touched"] <= 2 * 32 * 4
    assert stats["state_bytes"] < stats["bytes"] / 32
    alive = [t for t in gc.get_objects() if torch.is_tensor(t) and t.numel() >= stats["num_rows"]]
    assert {tuple(t.shape) for t in alive} <= {(stats["num_rows"], 64), (stats["num_rows"],)}
    assert sum(t.numel() * t.element_size() for t in alive) <= 1.05 * stats["bytes"]


def peak_bytes() -> int:
    """Of this process alone: `ru_maxrss` would also remember the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
    train_beside_a_large_table()
