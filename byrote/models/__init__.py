"""Hugging Face classes of the model families."""
