"""Cross-entropy of logits and its gradient in place, compiled; a row stays in the first cache. See `byrote.ops.cross_entropy`."""

# No `from __future__ import annotations` here: numba reads the signatures.
import numba
import numpy as np

from byrote.ops.loops.options import ONE, OPTIONS, TWO, UNIT, exp


@numba.njit(f"void(int64, int64, {TWO}, int64[::1], int64, {ONE}, {ONE})", **OPTIONS)
def cross_entropy(begin, end, logits, targets, ignored, largest, losses):
    """logits_t <- softmax(logits_t) - 1[y_t], losses_t = -log softmax(logits_t)[y_t]; 0 and 0 where y_t is ignored.

    `largest` [N]: the largest logit of each.
    """
    size = logits.shape[1]
    for t in range(begin, end):
        row, target = logits[t], targets[t]
        if target == ignored:
            row[:] = 0
            losses[t] = 0
            continue
        most, total, chosen = largest[t], np.float32(0), row[target]
        for c in range(size):
            row[c] = exp(row[c] - most)
            total += row[c]
        losses[t] = np.log(total) + most - chosen
        share = UNIT / total
        for c in range(size):
            row[c] *= share
        row[target] -= UNIT
