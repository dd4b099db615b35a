"""Validation loss: mean nats per predicted token, and bits per byte of the text.

    bits per byte = total nats / ln 2 / bytes of the validation text

Bits per byte compares models with different tokenizers. Tokens that end documents are counted in the nats.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from byrote.data.packing import Tokens, predicted, validation_batches


@dataclass(frozen=True)
class Validation:
    """What to evaluate on: the tokens and the bytes they stand for; the shape of batches."""

    data: Tokens
    bytes: int
    batch_size: int
    length: int


@dataclass(frozen=True)
class Score:
    """What an evaluation finds."""

    loss: float  # nats per token
    bits_per_byte: float | None  # None where only a part was evaluated
    tokens: int
    tokens_per_concept: float | None = None  # of models with concepts


def loss_options(model: nn.Module) -> dict[str, bool]:
    """What spares a model the logits where only its loss is wanted; some of Hugging Face's can do it too."""
    return {"skip_logits": True} if "skip_logits" in inspect.signature(model.forward).parameters else {}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    validation: Validation,
    precision: str = "float32",
    batches: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """`batches`: how many of the batches, spread over the text; 0: all. Ranks share them and get the same
    score. `report` hears of the batches that are done, and of how many.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    training, options = model.training, loss_options(model)
    model.eval()
    selected = validation_batches(validation.data, validation.batch_size, validation.length)
    rows, rest = divmod(len(validation.data) - 1, validation.length - 1)
    total = math.ceil(rows / validation.batch_size) + bool(rest)
    if batches:
        every = max(1, rows // validation.batch_size // batches)
        total = len(range(0, min(every * batches, total), every))
        selected = itertools.islice(selected, 0, every * batches, every)
    nats, tokens = 0.0, 0
    read, concepts = 0, 0
    done = 0
    report(done, total)
    while shared := list(itertools.islice(selected, world)):
        # As many forwards on every rank: sharded tables are read by all together.
        batch = shared[rank if rank < len(shared) else 0]
        on_device = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = model(**on_device, **options, num_items_in_batch=1, use_cache=False)
        if rank < len(shared):
            nats, tokens = nats + float(outputs.loss), tokens + predicted(batch)
            if outputs.get("boundaries") is not None:
                read, concepts = read + batch["input_ids"].numel(), concepts + int(outputs.boundaries.sum())
        done += len(shared)
        report(done, total)
    if world > 1:
        sums = torch.tensor([nats, tokens, read, concepts], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        nats, (tokens, read, concepts) = float(sums[0]), (int(count) for count in sums[1:])
    model.train(training)
    bits = nats / math.log(2) / validation.bytes if tokens == validation.data.predicted else None
    return Score(nats / max(1, tokens), bits, tokens, read / concepts if concepts else None)
