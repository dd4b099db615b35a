"""A table file that `RamTable.save` wrote, opened in place for reading: the base under a log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from byrote.tables.codecs import CODECS
from byrote.tables.table import check_row_ids


class MappedTable:
    """Rows are read through the mapping; nothing is written."""

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:  # checks that the file is as long as its header says
                header = json.loads((file.metadata() or {})["byrote"])
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"{path}: missing, truncated or not a table ({error})") from error
        with open(path, "rb") as raw:
            start = 8 + int.from_bytes(raw.read(8), "little")
        self.path, self.codec = path, header["codec"]
        self.num_rows, self.width, self.digest = header["num_rows"], header["width"], header["digest"]
        self.generation = header["generation"]
        shape = (self.num_rows, CODECS[self.codec].record_bytes(self.width))
        self._records = np.memmap(path, np.uint8, "r", start, shape)

    def read(self, rows: Tensor) -> Tensor:
        check_row_ids(rows, self.num_rows)
        records = torch.from_numpy(np.take(self._records, rows.reshape(-1).cpu().numpy(), axis=0))
        values = CODECS[self.codec].decode(records, self.width)
        return values.view(*rows.shape, self.width).to(rows.device)

    def stats(self) -> dict[str, Any]:
        return {"num_rows": self.num_rows, "width": self.width, "codec": self.codec, "bytes": self._records.nbytes}
