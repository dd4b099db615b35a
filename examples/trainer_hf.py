"""The stock transformers Trainer: byrote's optimizer and one callback. Stops half way and resumes.

python examples/trainer_hf.py FOLDER     needs: pip install accelerate
"""

import sys

import torch
from transformers import Trainer, TrainingArguments

from byrote import EngramConfig, EngramForCausalLM
from byrote.train import Optimizer, TableCallback


def dataset() -> list[dict[str, torch.Tensor]]:
    """Rows in which each of twelve tokens is followed by one of its own."""
    generator = torch.Generator().manual_seed(0)
    follower = torch.randperm(12, generator=generator) + 16
    rows = [torch.randint(4, 16, (12,), generator=generator) for _ in range(32)]
    ids = [torch.stack([row, follower[row - 4]], dim=1).flatten() for row in rows]
    return [{"input_ids": row, "labels": row} for row in ids]


def make_trainer(folder: str, steps: int) -> Trainer:
    model = EngramForCausalLM(EngramConfig.from_preset("nano", vocab_size=32))
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        save_steps=20,
        logging_steps=10,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
    )
    # The Trainer saves tables, which belong to the model; the callback brings them back on resume.
    return Trainer(
        model,
        arguments,
        train_dataset=dataset(),
        optimizers=(Optimizer(model, lr=3e-3), None),
        callbacks=[TableCallback()],
    )


def main(folder: str) -> None:
    torch.manual_seed(0)
    make_trainer(folder, steps=20).train()
    trainer = make_trainer(folder, steps=40)
    trainer.train(resume_from_checkpoint=True)
    memory = trainer.model.model.memories.memories["1"]
    print(f"step {trainer.state.global_step}, table at generation {memory.table.generation}")


if __name__ == "__main__":
    main(sys.argv[1])
