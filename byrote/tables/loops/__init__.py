"""Loops over rows that numba or Triton compile, each owned by the one file beside its plain twin.

Here stand only the constants that a loop shares with its twin.
"""

WAYS = 8  # slots of a set of a cache
HASHES = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)  # of a cache: of the set and of the two counters
EMPTY = -1  # a slot that holds no row
