"""Readers and writers of released checkpoints, under their own names."""
