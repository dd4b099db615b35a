"""The largest few of each row, compiled: torch takes several times as long for 4 of 64."""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
import numpy as np

from byrote.nn.kernels.options import OPTIONS, TWO


@numba.njit(f"void(int64, int64, {TWO}, int64[:,::1])", **OPTIONS)
def top_k(begin, end, scores, ids):
    """ids [N, K] of the K largest of scores [N, E], the largest first; of equal ones the one with the smaller id.

    What is not a number counts as the smallest.
    """
    k = ids.shape[1]
    held = np.empty(k, np.float32)
    for t in range(begin, end):
        for e in range(scores.shape[1]):
            score = scores[t, e] if scores[t, e] == scores[t, e] else -np.float32(np.inf)
            if e < k:
                place = e
            elif score > held[k - 1]:
                place = k - 1
            else:
                continue
            while place > 0 and score > held[place - 1]:
                held[place], ids[t, place] = held[place - 1], ids[t, place - 1]
                place -= 1
            held[place], ids[t, place] = score, e
