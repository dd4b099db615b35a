"""`train.placement = "sharded"`: a run over processes, its checkpoints, and its going on with other numbers."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerControl, TrainerState, TrainingArguments

from byrote.data.prepare import prepare
from byrote.models.engram import EngramForCausalLM
from byrote.train.checkpoint import latest
from byrote.train.hf_callback import TableCallback
from byrote.train.recipe import Recipe
from byrote.train.run import finish, make_trainer
from tests.processes import on_ranks

WORLD = 2


def run(recipe: Recipe, data: Path, folder: Path, resume: bool = False) -> EngramForCausalLM:
    trainer = make_trainer(recipe, folder, data, prepare(recipe.data.options, data), resume)
    finish(recipe, trainer, trainer.train(), data)
    return trainer.model


def worker(rank: int, recipe: str, data: str, folder: str, world: int, resume: bool) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}-rendezvous-{world}-{resume}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world)
    try:
        run(Recipe.load(Path(recipe)), Path(data), Path(folder), resume)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def assert_close(folder: Path, other: Path) -> None:
    first, second = (EngramForCausalLM.from_pretrained(path) for path in (folder, other))
    for name, value in second.named_parameters():
        torch.testing.assert_close(first.state_dict()[name], value, atol=1e-5, rtol=0)
    for (_, a), (_, b) in zip(first.memory_stack.items(), second.memory_stack.items(), strict=True):
        rows = torch.arange(a.table.num_rows)
        assert a.table.generation == b.table.generation == 6
        torch.testing.assert_close(a.table.read(rows), b.table.read(rows), atol=1e-5, rtol=0)


def test_a_run_over_processes(corpus, make_recipe, tmp_path):
    """It evaluates an odd number of batches, samples, checkpoints, and goes on with fewer and with more processes."""
    settings = {"steps": 6, "checkpoint_every": 3, "keep": 2, "eval_every": 2, "eval_batches": 1, "epsilon": 1e-2}
    sharded, host = make_recipe(placement="sharded", **settings), make_recipe(**settings)
    sharded.save(tmp_path / "recipe.json")
    data = corpus / "prepared"
    run(host, data, tmp_path / "host")

    def spawn(name: str, world: int, resume: bool) -> None:
        arguments = (str(tmp_path / "recipe.json"), str(data), str(tmp_path / name), world, resume)
        on_ranks(worker, arguments, world)

    spawn("sharded", WORLD, False)
    assert_close(latest(tmp_path / "sharded"), latest(tmp_path / "host"))
    assert (tmp_path / "sharded/sample.txt").read_text().strip()
    shutil.copytree(tmp_path / "sharded", tmp_path / "fewer")
    shutil.rmtree(latest(tmp_path / "fewer"))
    spawn("fewer", 1, True)
    assert_close(latest(tmp_path / "fewer"), latest(tmp_path / "host"))
    shutil.rmtree(latest(tmp_path / "fewer"))
    spawn("fewer", WORLD, True)
    assert_close(latest(tmp_path / "fewer"), latest(tmp_path / "host"))


def test_it_needs_processes(corpus, make_recipe, tmp_path):
    with pytest.raises(ValueError, match=r'train\.placement is "sharded", which needs processes'):
        run(make_recipe(placement="sharded"), corpus / "prepared", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r'train\.row_rule is "sinkhorn"'):
        make_recipe(placement="sharded", row_rule="sinkhorn")


def test_the_stock_trainer_refuses_it(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from byrote import EngramConfig

        model = EngramForCausalLM(EngramConfig.from_preset("nano", vocab_size=64, memory_layers=[1]))
        model.memory_stack.move("sharded")
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[])
        with pytest.raises(ValueError, match="all must save sharded tables"):
            TableCallback().on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)
    finally:
        dist.destroy_process_group()
