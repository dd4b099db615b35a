"""The largest few of each row, compiled: torch takes several times as long for 4 of 64.

A score and its place become one integer, in whose order the larger score comes first and of equal ones the earlier: the
largest integer is found without a branch.
"""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
import numpy as np

from byrote.ops.loops.options import TWO

TAKEN = np.int64(np.iinfo(np.int64).min)
SIGN, REST, INFINITY = np.int32(31), np.int32(0x7FFFFFFF), np.int32(0x7F800000)
SMALLEST = np.int32(np.iinfo(np.int32).min)


@numba.njit(f"void(int64, int64, {TWO}, int64[:,::1])", nogil=True, cache=True, error_model="numpy")
def top_k(begin, end, scores, ids):
    """ids [N, K] of the K largest of scores [N, E], the largest first; of equal ones the one with the smaller id.

    What is not a number counts as the smallest.
    """
    number = scores.shape[1]
    left = np.empty(number, np.int64)
    for t in range(begin, end):
        for e in range(number):
            bits = np.float32(scores[t, e] + np.float32(0)).view(np.int32)  # -0 becomes 0
            ordered = SMALLEST if (bits & REST) > INFINITY else bits ^ ((bits >> SIGN) & REST)
            left[e] = (np.int64(ordered) << np.int64(32)) + np.int64(number - 1 - e)
        for k in range(ids.shape[1]):
            most = TAKEN
            for e in range(number):
                most = max(most, left[e])
            place = np.int64(number - 1) - (most & np.int64(0xFFFFFFFF))
            ids[t, k], left[place] = place, TAKEN
