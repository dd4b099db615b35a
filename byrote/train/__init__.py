"""Training: recipes, the one optimizer, the loop, checkpoints, evaluation."""

from byrote.train.hf_callback import TableCallback
from byrote.train.muon import Muon
from byrote.train.optimizer import Optimizer

__all__ = ["Muon", "Optimizer", "TableCallback"]
