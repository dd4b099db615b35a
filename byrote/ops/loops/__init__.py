"""Loops over tokens that numba compiles: float32 on a CPU. Each has a plain twin in the module that calls it.

Whoever imports a file of this folder needs numba, so the modules of `byrote.nn` do so inside of their functions.
"""
