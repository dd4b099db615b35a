"""The contract `deepseek_v41`: DeepSeek-V4.1-Flash. The integers of `engram`, one table size for all orders, seed 0.

The release has orders 2 to 4. Its dead tokens (image spans) need no integers: `byrote.address.hashing` treats them
alike under every contract.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from byrote.address.contracts.engram import engram
from byrote.address.spec import AddressSpec


def deepseek_v41(
    vocabulary: np.ndarray,
    *,
    table_sizes: Sequence[int],
    heads: int,
    layer_ids: Sequence[int],
    pad_id: int,
    seed: int = 0,
) -> AddressSpec:
    """As `byrote.address.contracts.engram.engram`; ValueError where the table sizes differ or the seed is not 0."""
    if len(set(table_sizes)) > 1 or seed:
        raise ValueError(
            f"table_sizes is {list(table_sizes)} and seed {seed}: DeepSeek-V4.1 has one table size for all orders and "
            "seed 0"
        )
    about = {"heads": heads, "layer_ids": layer_ids, "pad_id": pad_id}
    return engram(vocabulary, table_sizes=table_sizes, contract="deepseek_v41", **about)  # type: ignore[arg-type]
