"""The hash of `hashing.py` as one compiled loop, which imports this file when it first needs it."""

import numba

from byrote.address.hashing import DEAD


@numba.njit(cache=True, nogil=True, error_model="numpy")
def hash_windows(windows, multipliers, primes, offsets, pad_id, out):
    """out [M, (N - 1) K] for windows [M, N], multipliers [N], primes [N - 1, K], offsets [(N - 1) K]; all int64."""
    orders, heads = primes.shape
    for i in range(windows.shape[0]):
        token = windows[i, 0]
        mix = (pad_id if token == DEAD else token) * multipliers[0]
        for order in range(orders):
            token = windows[i, order + 1]
            mix ^= (pad_id if token == DEAD else token) * multipliers[order + 1]
            for head in range(heads):
                column = order * heads + head
                out[i, column] = mix % primes[order, head] + offsets[column]
