"""Training: recipes, the one optimizer, the loop, checkpoints, evaluation."""
