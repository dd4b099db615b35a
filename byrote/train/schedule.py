"""The learning rate as a share of its peak, after s of S steps: linear warmup of W steps, then one of four.

    warmup     (s + 1) / (W + 1)                            for s < W
    constant   1
    cosine     f + (1 - f) (1 + cos(pi p)) / 2              p = (s - W) / (S - W), f the final share
    step       1, from 80 % of S 0.316, from 90 % 0.1       DeepSeek LLM section 2.3; V2: 60 % and 90 %
    wsd        1, then f + (1 - f) (S - s) / D              warmup, stable, decay over the last D = share of S steps

Percentages are of all steps, warmup included (DeepSeek LLM: of the training tokens). A warmup that is still going on
when a decay would begin comes first. WSD (MiniCPM, 2404.06395) is published with several forms of decay; this is the
straight line. The share multiplies the rate of every param group, so that groups keep their proportions (tables: 5x).

The weight of the prediction modules' loss goes down by steps (V3 section 4.2: 0.3 for 10 of 14.8 T tokens, then 0.1).
"""

import bisect
import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from byrote.train.recipe import TrainRecipe


def share(step: int, recipe: TrainRecipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / (recipe.warmup + 1)
    if recipe.schedule == "constant":
        return 1.0
    if recipe.schedule == "step":
        return (1.0, *recipe.step_shares)[_passed(recipe.step_at, step, recipe.steps)]
    begin = recipe.warmup
    if recipe.schedule == "wsd":
        begin = max(begin, recipe.steps - round(recipe.decay * recipe.steps))
    progress = max(0, step - begin) / max(1, recipe.steps - begin) if step < recipe.steps else 1.0
    falling = (1 + math.cos(math.pi * progress)) / 2 if recipe.schedule == "cosine" else 1 - progress
    return recipe.final_rate + (1 - recipe.final_rate) * falling


def mtp_weight(step: int, recipe: TrainRecipe) -> float:
    return recipe.mtp_weights[_passed(recipe.mtp_weight_at, step, recipe.steps)]


def same_until(steps: int, one: TrainRecipe, other: TrainRecipe, predicts: bool) -> bool:
    """Whether both give the first `steps` steps the same rates and, if the model predicts further tokens, weights.

    A checkpoint holds the rate of the step behind it too.
    """
    return all(
        share(s, one) == share(s, other) and (not predicts or mtp_weight(s, one) == mtp_weight(s, other))
        for s in range(steps)
    )


def _passed(places: tuple[float, ...], step: int, steps: int) -> int:
    """How many of the places, shares of all steps, lie behind."""
    return bisect.bisect_right([round(at * steps) for at in places], step)


def schedule(optimizer: torch.optim.Optimizer, recipe: TrainRecipe) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: share(step, recipe))
