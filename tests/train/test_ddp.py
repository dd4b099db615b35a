"""Two processes with replicated tables take the steps of one process: same global batch, same trajectory."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from byrote import EngramConfig, EngramForCausalLM
from byrote.train.muon import Muon
from byrote.train.optimizer import Optimizer
from tests.processes import on_ranks

STEPS, WORLD, MEMORY_LAYERS = 3, 2, [1, 2]
MUON = Muon(coefficients="jordan")  # hybrid enlarges singular values that are nothing but rounding more
KINDS = pytest.mark.parametrize("kind", ["train", "muon"])


def make() -> EngramForCausalLM:
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "memory_layers": MEMORY_LAYERS, "router_bias_update_rate": 0.01}
    return EngramForCausalLM(EngramConfig.from_preset("nano", num_nextn_predict_layers=1, **settings)).train()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with different numbers of predicted tokens; in step 1 the second rank has none."""
    ids = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(step))
    labels = ids.clone()
    for row in range(4):
        labels[row, : 2 * row + 1] = -100
    if step == 1:
        labels[2:] = -100
    return ids, labels


def train(model, forward, rows: slice, world: int, muon: Muon | None = None) -> dict:
    optimizer = Optimizer(model, lr=3e-3, eps=1e-2, router_bias_rate=0.01, muon=muon)
    touched = []
    for step in range(STEPS):
        ids, labels = batch(step)
        # The mean over ranks of sums over (items / world) is the sum over all items.
        items = (labels[:, 1:] != -100).sum() / world
        forward(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=items).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        touched.append(optimizer.rows_touched)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state |= {f"rows.{layer}": memory.table.rows for layer, memory in model.model.memories.items()}
    return {"state": state, "touched": touched, "max_violation": optimizer.max_violation}


def worker(rank: int, folder: str) -> None:
    """All jobs, one after the other: starting a process takes longer than the rest."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        torch.save({name: job(rank) for name, job in JOBS.items()}, Path(folder, f"rank-{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def job_train(rank: int):
    model = make()
    rows = slice(2 * rank, 2 * rank + 2)
    return train(model, DistributedDataParallel(model), rows, WORLD)


def job_muon(rank: int):
    model = make()
    rows = slice(2 * rank, 2 * rank + 2)
    return train(model, DistributedDataParallel(model), rows, WORLD, MUON)


def job_non_finite(rank: int):
    """One rank meets an infinite loss: every rank raises, none waits, and nothing has moved."""
    model = make()
    optimizer = Optimizer(model)
    ids, labels = batch(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = model(input_ids=ids, labels=labels).loss * (float("inf") if rank else 1.0)
    loss.backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        message = str(error)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    return {"message": message, "moved": moved}


def job_nothing(rank: int):
    """No rank has a row gradient: no row moves, no generation passes."""
    model = make()
    optimizer = Optimizer(model)
    optimizer.step()
    return {"generations": [memory.table.generation for _, memory in model.model.memories.items()]}


JOBS = {"train": job_train, "muon": job_muon, "non_finite": job_non_finite, "nothing": job_nothing}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each job gave on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(worker, (str(folder),), WORLD)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(WORLD)]


@KINDS
def test_replicas_stay_equal(ranks, kind):
    first, second = (result[kind] for result in ranks)
    assert first["touched"] == second["touched"]
    assert first["state"].keys() == second["state"].keys()
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


@KINDS
def test_two_ranks_follow_one(ranks, kind):
    """With a large epsilon, so that Adam shows the gradient and not the sign of its rounding."""
    together, model = ranks[0][kind], make()
    alone = train(model, model, slice(None), 1, MUON if kind == "muon" else None)
    assert alone["touched"] == together["touched"] and alone["max_violation"] == together["max_violation"]
    tolerance = 1e-6 if kind == "train" else 1e-5  # of the 5e-3 that a step of Muon is long here
    for name, value in alone["state"].items():
        if name.endswith("identity"):  # another one, where rows are equal but for rounding
            continue
        ours = together["state"][name]
        torch.testing.assert_close(ours, value, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    biases = [value for name, value in together["state"].items() if "selection_bias" in name]
    assert biases and all(bias.any() for bias in biases)
    assert int(together["state"][f"model.memories.memories.{MEMORY_LAYERS[0]}.generation"]) == STEPS


def test_a_rank_does_not_raise_alone(ranks):
    for result in ranks:
        assert "not finite" in result["non_finite"]["message"] and result["non_finite"]["moved"] == []


def test_ranks_with_nothing_to_exchange(ranks):
    assert [result["nothing"]["generations"] for result in ranks] == [[0, 0]] * WORLD
