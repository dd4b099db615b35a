"""On two processes the loss of the compression has the gradient that one process gives the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from byrote import DLCMConfig, DLCMForCausalLM
from tests.processes import on_ranks

WORLD = 2


def make() -> DLCMForCausalLM:
    torch.manual_seed(0)
    # A weight at which the loss of the compression counts.
    return DLCMForCausalLM(DLCMConfig(vocab_size=64, boundary_weight=5.0, initializer_range=0.1)).train()


def batch() -> dict[str, torch.Tensor]:
    """Rows whose rates of boundaries differ, so that the rate of either half is not that of the whole."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (4, 16), generator=generator)
    often = torch.tensor([[0.1], [0.2], [0.6], [0.8]])
    return {"input_ids": ids, "labels": ids, "boundaries": torch.rand(4, 16, generator=generator) < often}


def gradients(model, forward, rows: slice, world: int) -> dict[str, torch.Tensor]:
    part = {name: tensor[rows] for name, tensor in batch().items()}
    forward(**part, num_items_in_batch=60 / world).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        model = make()
        found = gradients(model, DistributedDataParallel(model), slice(2 * rank, 2 * rank + 2), WORLD)
        torch.save(found, Path(folder, f"rank-{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_processes_find_the_gradient_of_one(tmp_path):
    on_ranks(worker, (str(tmp_path),), WORLD)
    together = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(WORLD)]
    model = make()
    alone = gradients(model, model, slice(None), 1)
    assert alone["model.concepts.boundary.query.weight"].abs().max() > 1e-3
    for name, gradient in alone.items():
        assert torch.equal(together[0][name], together[1][name]), name
        torch.testing.assert_close(together[0][name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    # Each half by itself would have found another one.
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        half = make()
        halves.append(gradients(half, half, rows, 2)["model.concepts.boundary.query.weight"])
    apart = sum(halves) / 2
    assert (apart - alone["model.concepts.boundary.query.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("field", ["boundary_counts"])
def test_counts_may_be_given(field):
    """What the trainer does for micro-batches: parts that know the counts of the whole add up to it."""
    whole, parts = make(), make()
    inputs = batch()
    expected = gradients(whole, whole, slice(None), 1)
    counts = torch.tensor([float((inputs["boundaries"] | starts()).sum()), 64.0])
    for row in range(4):
        part = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        parts(**part, num_items_in_batch=60, **{field: counts}).loss.backward()
    for name, parameter in parts.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)


def starts() -> torch.Tensor:
    first = torch.zeros(4, 16, dtype=torch.bool)
    first[:, 0] = True
    return first
