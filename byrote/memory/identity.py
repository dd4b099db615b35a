"""The identity of a table: a digest of how its rows came about, by which a backbone knows the table that is its own.

    identity <- mix(identity, generation, change)        at every commit; 63 bits

A generation is an age and no more: two runs have tables of one age. `change` is a checksum of rows that the step has
changed, as they are now, so runs that fork from one checkpoint differ after a step. It is a sum over rows, found by
their ids: the same for every placement, for ranks that hold a share each, and for a run that was resumed. Of a step
with many rows some 4,096 are looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from byrote.tables.table import Table

SAMPLE = 4096
BITS = 2**64
ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)  # of splitmix64 (Steele et al. 2014)


def change_of(table: Table, rows: Tensor, total: int) -> int:
    """The checksum of the rows [U] that this rank has changed, summed over the ranks, which changed `total`."""
    seen = rows[_mixed(rows) % -(-total // SAMPLE) == 0] if total > SAMPLE else rows
    values = table.read_own(seen).contiguous().view(torch.int32).long()
    columns = _mixed(torch.arange(1, table.width + 1, device=values.device))
    return table.totals(int(_mixed((values * columns).sum(1) ^ _mixed(seen)).sum()))[0]


def next_identity(*numbers: int) -> int:
    """Of the identity before, the generation and what has changed; never UNKNOWN."""
    state = 0
    for number in numbers:
        state = (state + number % BITS + ODD[0]) % BITS
        state = ((state ^ (state >> 30)) * ODD[1]) % BITS
        state ^= state >> 31
    return state >> 1 or 1


def _mixed(numbers: Tensor) -> Tensor:
    """int64 to int64, as a hash; sums and products wrap around."""
    numbers = numbers * (ODD[0] - BITS)
    numbers = (numbers ^ (numbers >> 29)) * (ODD[1] - BITS)
    return numbers ^ (numbers >> 32)
