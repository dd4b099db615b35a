"""The stock transformers Trainer trains a model with tables, and one callback brings the tables back."""

import copy
import shutil

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from byrote import EngramConfig, EngramForCausalLM
from byrote.train.hf_callback import TableCallback
from byrote.train.optimizer import Optimizer

STEPS, LENGTH = 6, 16


class Tokens(Dataset):
    """Rows of ids that follow a rule, so that there is something to learn."""

    def __init__(self, rows=64, seed=1):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(3, 20, (rows, 1), generator=generator)
        self.ids = 3 + (start + torch.arange(LENGTH) * (1 + start % 3)) % 20

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def make(seed=0, **overrides) -> EngramForCausalLM:
    torch.manual_seed(seed)
    return EngramForCausalLM(EngramConfig.from_preset("nano", vocab_size=32, memory_layers=[1, 2], **overrides))


def trainer(model, folder, *, callback=True, lr=3e-3, placement="host", **options) -> Trainer:
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**settings, **options}),
        train_dataset=Tokens(),
        eval_dataset=Tokens(8, seed=2),
        optimizers=(Optimizer(model, lr=lr), None),
        callbacks=[TableCallback(placement=placement)] if callback else [],
    )


def snapshot(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for layer, memory in model.model.memories.items():
        rows = torch.arange(memory.table.num_rows)
        state[f"rows.{layer}"] = memory.table.read(rows)
        fields = Optimizer(model).rule.fields(memory.table.width)
        state |= {f"{name}.{layer}": value for name, value in memory.table.read_state(rows, fields).items()}
    return state


def assert_same(ours, theirs, tolerance=0.0):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if tolerance and name.endswith("identity"):  # another one, where rows are equal but for rounding
            continue
        torch.testing.assert_close(value, theirs[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def test_it_trains(tmp_path):
    model = make()
    before = snapshot(model)
    trained = trainer(model, tmp_path, max_steps=30)
    trained.train()
    assert losses(trained)[-1] < 0.8 * losses(trained)[0]
    after = snapshot(model)
    assert all(not torch.equal(after[f"rows.{layer}"], before[f"rows.{layer}"]) for layer in (1, 2))
    assert int(model.model.memories.memories["1"].generation) == 30
    # The schedule that the Trainer makes itself is linear to zero, for every kind.
    assert [group["lr"] for group in trained.optimizer.param_groups] == pytest.approx([0.0] * 3)


@pytest.fixture
def interrupted(tmp_path):
    """An uninterrupted run that leaves a checkpoint at half of its steps."""
    model = make()
    trainer(model, tmp_path, save_strategy="steps", save_steps=STEPS // 2).train()
    return model, tmp_path / f"checkpoint-{STEPS // 2}"


@pytest.mark.parametrize("explicit", [True, False])
def test_resume_equals_uninterrupted(interrupted, tmp_path, explicit):
    expected, checkpoint = interrupted
    if explicit:
        resume = str(checkpoint)
    else:
        resume = True  # the newest
        for file in (tmp_path / f"checkpoint-{STEPS}").iterdir():
            file.unlink()
        (tmp_path / f"checkpoint-{STEPS}").rmdir()
    resumed = make(seed=9)
    trainer(resumed, tmp_path, save_strategy="no").train(resume_from_checkpoint=resume)
    assert_same(snapshot(resumed), snapshot(expected))


@pytest.mark.parametrize("placement", ["host", "file"])
def test_a_run_can_be_resumed_again_and_again(tmp_path, placement):
    """What a resumed run saves holds the state of the rows, as the first run's checkpoints do."""
    saving = {"placement": placement, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    model = make()
    trainer(model, tmp_path, **saving).train()
    expected = snapshot(model)
    for last in (1, 2, 3):
        for later in range(last + 1, 5):
            shutil.rmtree(tmp_path / f"checkpoint-{later}", ignore_errors=True)
        resumed = make(seed=9)
        trainer(resumed, tmp_path, **saving).train(resume_from_checkpoint=True)
        assert_same(snapshot(resumed), expected)


@pytest.mark.parametrize("placement", ["host", "file"])
def test_the_trainers_own_optimizer_moves_rows_and_resumes(tmp_path, placement):
    def run(model, **options):
        run = trainer(model, tmp_path, placement=placement, save_strategy="steps", save_steps=1, max_steps=3)
        run.optimizer = None  # the Trainer makes AdamW
        run.train(**options)
        return snapshot(model)

    before = snapshot(make())
    expected = run(make())
    assert all(not torch.equal(expected[f"rows.{layer}"], before[f"rows.{layer}"]) for layer in (1, 2))
    assert all(expected[f"touches.{layer}"].any() for layer in (1, 2))
    for last in (1, 2):
        for later in range(last + 1, 4):
            shutil.rmtree(tmp_path / f"checkpoint-{later}", ignore_errors=True)
        assert_same(run(make(seed=9), resume_from_checkpoint=True), expected)


def test_a_run_whose_best_model_came_back_can_be_resumed(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {**saving, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    model = make()
    run = trainer(model, tmp_path, max_steps=2, **best)
    run.train()
    run.args.max_steps = 3
    run.train(resume_from_checkpoint=True)  # by the trainer whose training had ended
    shutil.rmtree(tmp_path / "checkpoint-3")
    again = make(seed=9)
    trainer(again, tmp_path, max_steps=3, **best).train(resume_from_checkpoint=True)
    assert_same(snapshot(again), snapshot(model))


def test_resume_of_a_model_that_was_loaded_from_the_checkpoint(interrupted, tmp_path):
    """Its rows are there already, their state is not."""
    expected, checkpoint = interrupted
    resumed = EngramForCausalLM.from_pretrained(checkpoint)
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert_same(snapshot(resumed), snapshot(expected))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpoint_is_whole_when_older_ones_are_removed(when, tmp_path, monkeypatch):
    """A crash then loses nothing: rows and their state are there."""
    expected = make()
    trainer(expected, tmp_path / "whole").train()
    rotate, step = rotate_checkpoints, f"checkpoint-{STEPS // 2}"

    def crash(*args, **kwargs):
        if (tmp_path / "cut" / step).exists():
            if when == "after":
                rotate(*args, **kwargs)
            raise KeyboardInterrupt
        rotate(*args, **kwargs)

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", crash)
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    with pytest.raises(KeyboardInterrupt):
        trainer(make(), tmp_path / "cut", **saving).train()
    monkeypatch.undo()
    assert len(list((tmp_path / "cut").glob("checkpoint-*"))) == (1 if when == "after" else 2)
    resumed = make(seed=9)
    trainer(resumed, tmp_path / "cut").train(resume_from_checkpoint=str(tmp_path / "cut" / step))
    assert_same(snapshot(resumed), snapshot(expected))


def test_resume_from_another_folder(interrupted, tmp_path):
    expected, checkpoint = interrupted
    moved = tmp_path / "moved" / "checkpoint-3"
    moved.parent.mkdir()
    checkpoint.rename(moved)
    resumed = make(seed=9)
    run = trainer(resumed, tmp_path / "new", callback=False)
    run.add_callback(TableCallback(resume_from_checkpoint=moved))
    run.train(resume_from_checkpoint=str(moved))
    assert_same(snapshot(resumed), snapshot(expected))
    lost = trainer(make(seed=9), tmp_path / "newer")
    with pytest.raises(ValueError, match="no checkpoint among"):
        lost.train(resume_from_checkpoint=str(moved))


def test_without_the_callback_the_first_forward_names_the_remedy(interrupted, tmp_path):
    _, checkpoint = interrupted
    run = trainer(make(seed=9), tmp_path, callback=False)
    with pytest.raises(RuntimeError, match="generation 3 of its table, the table is at 0"):
        run.train(resume_from_checkpoint=str(checkpoint))


def test_the_best_tables_come_back(tmp_path):
    """The rate grows until training diverges, so that the best evaluation is not the last."""
    model = make()
    run = trainer(
        model,
        tmp_path,
        lr=1e-2,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        max_steps=4,
    )
    run.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: [1, 1, 300, 300, 300][step])
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None and not best.endswith("checkpoint-4")
    assert_same(snapshot_weights(model), snapshot_weights(EngramForCausalLM.from_pretrained(best)))
    evaluated = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert run.evaluate()["eval_loss"] == pytest.approx(evaluated[int(best.rsplit("-", 1)[1])], abs=1e-6)


def snapshot_weights(model):
    return {name: value for name, value in snapshot(model).items() if not name.startswith(("exp_", "touches"))}


def test_gradient_accumulation(tmp_path):
    """4 x 2 = 1 x 8, with a large epsilon so that the first steps show the gradient and not only its sign."""
    results = []
    for size, accumulate in ((8, 1), (2, 4)):
        model = make()
        run = trainer(
            model,
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
        )
        run.optimizer = Optimizer(model, eps=1e-3)
        run.train()
        results.append(snapshot_weights(model))
    assert_same(*results, tolerance=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(tmp_path, use_reentrant):
    plain, checkpointed = make(), make()
    trainer(plain, tmp_path, max_steps=2).train()
    trainer(
        checkpointed,
        tmp_path,
        max_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    ).train()
    assert_same(snapshot(checkpointed), snapshot(plain))


def test_bf16(tmp_path):
    model = make()
    run = trainer(model, tmp_path, bf16=True, max_steps=30)
    run.train()
    assert losses(run)[-1] < 0.85 * losses(run)[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_evaluation_changes_nothing(tmp_path):
    model = make()
    run = trainer(model, tmp_path)
    before = copy.deepcopy(snapshot(model))
    run.evaluate()
    run.predict(Tokens(8))
    assert_same(snapshot(model), before)
