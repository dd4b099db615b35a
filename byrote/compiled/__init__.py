"""Compiled loops: whether they can run and how, and vectors in their machine code."""
