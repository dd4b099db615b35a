"""The learning rate as a share of its peak, step by step: linear warmup, then constant or cosine.

    warmup     (s + 1) / (W + 1)                            for s < W
    constant   1
    cosine     f + (1 - f) (1 + cos(pi p)) / 2              p = (s - W) / (S - W), f the final share

The share multiplies the rate of every param group, so that groups keep their proportions (tables: 5x).
"""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from byrote.train.config import TrainRecipe


def share(step: int, recipe: TrainRecipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / (recipe.warmup + 1)
    if recipe.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
    return recipe.final_rate + (1 - recipe.final_rate) * (1 + math.cos(math.pi * progress)) / 2


def schedule(optimizer: torch.optim.Optimizer, recipe: TrainRecipe) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: share(step, recipe))
