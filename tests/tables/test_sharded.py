"""Tables spread over the ranks of a process group: what n ranks read, train and save is what one process does."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from byrote import EngramConfig, EngramForCausalLM
from byrote.tables import CODECS, RamTable
from byrote.tables.placements.ranks import Ranks
from byrote.tables.placements.sharded import ShardedTable
from byrote.train.optimizer import Optimizer
from tests.processes import on_ranks

ROWS, WIDTH, DIGEST, STEPS = 101, 5, "d" * 64, 3  # 101 rows: no number of ranks divides them
WANTED = {"num_rows": ROWS, "width": WIDTH, "digest": DIGEST}
FIELDS = {"moment": (WIDTH,), "touches": ()}


def make_table(codec: str = "fp32") -> RamTable:
    return RamTable(ROWS, WIDTH, digest=DIGEST, seed=4, codec=codec)


def write_some(table, codec: str = "fp32") -> None:
    generator = torch.Generator().manual_seed(0)
    for rows in (torch.tensor([7, 2, 30, 100]), torch.tensor([2, 39, 41])):
        values, moment = (torch.randn(len(rows), WIDTH, generator=generator) for _ in range(2))
        table.write(rows, values, {"moment": moment, "touches": torch.ones(len(rows))})
        table.commit()


def make_model() -> EngramForCausalLM:
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "memory_layers": [1, 2], "router_bias_update_rate": 0.01}
    return EngramForCausalLM(EngramConfig.from_preset("nano", **settings)).train()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In step 1 the second half of the rows predicts nothing."""
    ids = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(step))
    labels = ids.clone()
    labels[0, :5] = -100
    if step == 1:
        labels[2:] = -100
    return ids, labels


def train(model, steps: range, rank: int = 0, world: int = 1, checkpointing: bool = False):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    forward = DistributedDataParallel(model) if world > 1 else model
    optimizer, rows = Optimizer(model, lr=3e-3, eps=1e-2), slice(4 * rank // world, 4 * (rank + 1) // world)
    for step in steps:
        ids, labels = batch(step)
        items = (labels[:, 1:] != -100).sum() / world
        forward(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=items, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.rows_touched


def state_of(model) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for layer, memory in model.memory_stack.items():
        state[f"rows.{layer}"] = memory.table.read(torch.arange(memory.table.num_rows))
    return state


def message(call) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def worker(rank: int, world: int, folder: str) -> None:
    """All jobs, one after the other: starting a process takes longer than the rest."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    try:
        jobs = (job_read, job_files, job_train, job_resume, job_refusals)
        torch.save({job.__name__: job(rank, world, Path(folder)) for job in jobs}, Path(folder, f"rank-{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def job_read(rank: int, world: int, folder: Path):
    """Ids that differ, repeat and are none on the last rank; equal to the last bit."""
    equal = []
    for codec in CODECS:
        whole, table = make_table(codec), ShardedTable.split(make_table(codec), Ranks())
        size = 0 if rank == world - 1 else 60
        rows = torch.randint(0, ROWS, (size // 4, 4), generator=torch.Generator().manual_seed(rank))
        equal.append(torch.equal(table.read(rows), whole.read(rows)))
        state = table.read_state(rows.flatten().unique(), FIELDS)
        equal.append(not any(value.any() for value in state.values()) and len(state["touches"]) == len(rows.unique()))
        equal.append(table.part.num_rows == len(range(rank, ROWS, world)))
    return equal


def job_files(rank: int, world: int, folder: Path):
    """Writes, the files, and the files of one process opened again."""
    equal = []
    for codec in ("fp32", "bf16", "int4"):
        ranks = Ranks()
        whole, table = make_table(codec), ShardedTable.split(make_table(codec), ranks)
        names = [folder / f"{codec}-{name}-{rank if name == 'whole' else 'all'}" for name in ("whole", "table")]
        table.save_state(names[1].with_suffix(".none"))
        whole.save_state(names[0].with_suffix(".none"))
        for each, name in zip((whole, table), names, strict=True):
            write_some(each)
            each.save(name.with_suffix(".rows"))
            each.save_state(name.with_suffix(".state"))
        for kind in (".none", ".rows", ".state"):
            equal.append(names[0].with_suffix(kind).read_bytes() == names[1].with_suffix(kind).read_bytes())
        opened = ShardedTable.open(names[0].with_suffix(".rows"), ranks=ranks, **WANTED)
        opened.load_state(names[0].with_suffix(".state"))
        every = torch.arange(ROWS)
        equal.append(torch.equal(opened.read(every), whole.read(every)) and opened.generation == 2)
        ours, theirs = opened.read_state(every, FIELDS), whole.read_state(every, FIELDS)
        equal.extend(torch.equal(ours[name], theirs[name]) for name in FIELDS)
        again = ShardedTable.split(whole, ranks)  # a table that is trained already brings its state
        equal.append(torch.equal(again.read_state(every, FIELDS)["moment"], theirs["moment"]))
    return equal


def job_train(rank: int, world: int, folder: Path):
    results = {}
    for name in ("replicated", "sharded", "checkpointing"):
        model = make_model()
        if name != "replicated":
            model.memory_stack.move("sharded")
        touched = train(model, range(STEPS), rank, world, name == "checkpointing")
        results[name] = {"state": state_of(model), "touched": touched}
        if name == "sharded":
            model.save_pretrained(folder / "trained")
            model.save_row_state(folder / "trained")
    return results


def job_resume(rank: int, world: int, folder: Path):
    """What one process saved goes on here."""
    model = EngramForCausalLM.from_pretrained(folder / "alone", placement="sharded").train()
    model.load_row_state(folder / "alone")
    train(model, range(STEPS, 2 * STEPS), rank, world)
    return state_of(model)


def job_refusals(rank: int, world: int, folder: Path):
    table = ShardedTable.split(make_table(), Ranks())
    bad = torch.tensor([1, ROWS if rank == 0 else 2])
    found = {"rows": message(lambda: table.read(bad))}
    model = make_model()
    model.memory_stack.move("sharded")
    optimizer = Optimizer(model)
    ids, labels = batch(0)
    before = state_of(model)
    (model(input_ids=ids, labels=labels).loss * (float("inf") if rank == 0 else 1.0)).backward()
    found["gradient"] = message(optimizer.step)
    after = state_of(model)
    found["moved"] = [name for name in before if not torch.equal(before[name], after[name])]
    found["sinkhorn"] = message(Optimizer(model, row_rule="sinkhorn").step)
    small = RamTable(world - 1, 2, digest=DIGEST)
    found["small"] = message(lambda: ShardedTable.split(small, table.ranks))
    return found


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """What each job gave on each rank; the folder; and what one process did."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    alone = make_model()
    touched = train(alone, range(STEPS))
    alone.save_pretrained(folder / "alone")
    alone.save_row_state(folder / "alone")
    on_ranks(worker, (world, str(folder)), world)
    results = [torch.load(folder / f"rank-{rank}.pt") for rank in range(world)]
    return results, folder, {"state": state_of(alone), "touched": touched}


def assert_close(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.endswith("identity"):  # of rows to the last bit
            continue
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("job", ["job_read", "job_files"])
def test_ranks_read_and_write_what_one_process_does(ranks, job):
    assert all(all(result[job]) for result in ranks[0])


def test_training_equals_replicated_tables_and_one_process(ranks):
    """The first to the last bit."""
    results, _, alone = ranks
    for result in (each["job_train"] for each in results):
        assert result["sharded"]["touched"] == result["replicated"]["touched"] == alone["touched"]
        for name, value in result["replicated"]["state"].items():
            assert torch.equal(result["sharded"]["state"][name], value), name
        assert_close(result["sharded"]["state"], alone["state"])
        assert_close(result["checkpointing"]["state"], alone["state"])


def test_a_checkpoint_of_many_ranks_goes_on_in_one_process_and_the_other_way(ranks):
    results, folder, _ = ranks
    model = EngramForCausalLM.from_pretrained(folder / "trained").train()
    model.load_row_state(folder / "trained")
    again = EngramForCausalLM.from_pretrained(folder / "alone").train()
    again.load_row_state(folder / "alone")
    for each in (model, again):
        train(each, range(STEPS, 2 * STEPS))
    expected = state_of(again)
    assert_close(state_of(model), expected)
    for result in results:
        assert_close(result["job_resume"], expected)


def test_errors_are_those_of_all_ranks(ranks):
    for rank, found in enumerate(result["job_refusals"] for result in ranks[0]):
        assert ("leave the table" if rank == 0 else "rank 0 asked for rows that are not there") in found["rows"]
        assert "row gradients are not finite" in found["gradient"] and found["moved"] == []
        assert "sinkhorn" in found["sinkhorn"] and "use fewer" in found["small"]


@pytest.mark.parametrize("world", [2, 4, 7])
def test_ownership_is_balanced_on_zipf_ids(world):
    """Every order and head, each a stretch of the table: distinct rows that a batch asks of each rank."""
    rng, heads, stretch = np.random.default_rng(0), 16, 10_007
    ngrams = np.minimum(rng.zipf(1.2, 8192), 10**9)
    for head in range(heads):
        rows = (ngrams * (2 * int(rng.integers(10**9)) + 1)) % stretch + head * stretch
        loads = np.bincount(np.unique(rows) % world, minlength=world)
        assert loads.max() < 1.15 * loads.mean(), (head, loads)
        owned = np.bincount(np.arange(head * stretch, (head + 1) * stretch) % world)
        assert owned.max() - owned.min() <= 1


def test_a_process_group_is_asked_for():
    with pytest.raises(ValueError, match="need a process group: start with torchrun"):
        Ranks()
