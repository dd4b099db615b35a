"""Record: the bytes of a changed row in a log.

flag u8 (1: rule state was written) | values as the codec stores them | state fields, float32, in their order
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from byrote.tables.codecs import CODECS
from byrote.tables.files.format import as_bytes
from byrote.tables.table import RowState, StateFields


class Record:
    """Of rows of `width` values in `codec`, with the state `fields` of a rule. Records are NumPy, uint8 [N, size]."""

    def __init__(self, codec: str, width: int, fields: StateFields) -> None:
        self.codec, self.width = CODECS[codec], width
        self.fields = {name: tuple(shape) for name, shape in fields.items()}
        self.head = 1 + self.codec.record_bytes(width)  # bytes of flag and values
        self._places: dict[str, tuple[int, int]] = {}
        self.size = self.head
        for name, shape in self.fields.items():
            self._places[name] = (self.size, self.size + 4 * math.prod(shape))
            self.size += 4 * math.prod(shape)

    def values(self, records: np.ndarray) -> Tensor:
        """Float32 [N, W], of records or of their heads."""
        return self.codec.decode(torch.from_numpy(np.ascontiguousarray(records[:, 1 : self.head])), self.width)

    def set_values(self, records: np.ndarray, values: Tensor, generator: torch.Generator) -> None:
        records[:, 1 : self.head] = self.codec.encode(values.to("cpu", torch.float32), generator).numpy()

    def state(self, records: np.ndarray, name: str) -> Tensor:
        """One field, float32 [N, *shape]."""
        begin, end = self._places[name]
        values = np.ascontiguousarray(records[:, begin:end]).reshape(-1).view(np.float32)
        return torch.from_numpy(values).view(len(records), *self.fields[name])

    def set_state(self, records: np.ndarray, state: RowState) -> None:
        """All fields."""
        records[:, 0] = 1
        for name, (begin, end) in self._places.items():
            records[:, begin:end] = as_bytes(state[name].to("cpu", torch.float32), end - begin)

    def clear_state(self, records: np.ndarray) -> None:
        records[:, 0], records[:, self.head :] = 0, 0
