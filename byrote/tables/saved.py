"""Files of tables of ours: plain safetensors, readable by anything.

- rows:  tensor `rows` [R, W], or [R, B] of bytes for the packed codecs
- state: tensor `rows` [U] (ascending row ids) and one tensor a field [U, ...]
- both:  metadata `byrote` = JSON {format_version, digest, generation, identity, num_rows, width, codec}; `identity` is
         16 hexadecimal digits, and absent in files that are older than it

They are written by `stream.py`. A `RamTable` reads them whole, a `FileTable` in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from byrote.tables.codecs import CODECS
from byrote.tables.stream import stream
from byrote.tables.table import UNKNOWN, RowState, check_row_ids

FORMAT_VERSION = 1
HEADER = ("digest", "generation", "num_rows", "width", "codec")


def header_of(table: Any) -> dict[str, Any]:
    about = {name: getattr(table, name) for name in HEADER}
    identity = getattr(table, "identity", UNKNOWN)
    return {"format_version": FORMAT_VERSION, **about} | ({"identity": f"{identity:016x}"} if identity else {})


def identity_in(header: Mapping[str, Any]) -> int:
    """Of a header, a pointer or any other JSON; UNKNOWN where it holds none."""
    return int(header.get("identity", "0"), 16)


def save_state_file(path: Path, table: Any, rows: Tensor, state: RowState) -> None:
    """Row ids [U] and their rule state, whole in memory."""
    stream(path, {"rows": whole(rows), **{name: whole(state[name]) for name in sorted(state)}}, header_of(table))


def whole(tensor: Tensor) -> tuple[torch.dtype, torch.Size, Callable[[], Iterator[Tensor]]]:
    """A tensor in one piece, for `stream`."""
    return tensor.dtype, tensor.shape, lambda: iter([tensor.cpu()])


def table_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """The header of a table of ours, from the metadata of its file."""
    header = json.loads(metadata.get("byrote", "{}"))
    if header.get("format_version") != FORMAT_VERSION:
        version = header.get("format_version")
        raise ValueError(f"{path}: table format_version {version}, this byrote reads {FORMAT_VERSION}")
    if missing := [name for name in HEADER if name not in header]:
        raise ValueError(f"{path}: the header lacks {missing}; write tables with save_pretrained or Table.save")
    if header["codec"] not in CODECS:
        raise ValueError(f"{path}: codec {header['codec']!r}, this byrote reads {sorted(CODECS)}")
    return header


def check_wanted(path: Path, header: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ValueError where the header is not of the table that is wanted."""
    for field, expected in wanted.items():
        if header[field] != expected:
            raise ValueError(
                f"{path}: {field} is {header[field]}, the model needs {expected}; "
                "the table was made for another address spec or config"
            )


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors) of a file; ValueError where it is absent, truncated or not of a table."""
    if not path.is_file():
        raise ValueError(f"{path}: no such table file")
    try:
        with safe_open(path, framework="pt") as file:
            header = table_header(path, file.metadata() or {})
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a table ({error})") from error


def load_state_file(path: Path, table: Any) -> tuple[Tensor, RowState]:
    """Row ids and rule state that `save_state` wrote of `table`; ValueError where they belong to other rows."""
    header, arrays = load(path)
    for field in ("digest", "num_rows", "width", "generation"):
        if header[field] != getattr(table, field):
            raise ValueError(
                f"{path}: row state has {field} {header[field]}, the table has {getattr(table, field)}; "
                "take rows and row state from one checkpoint"
            )
    if UNKNOWN not in (identity_in(header), table.identity) and identity_in(header) != table.identity:
        raise ValueError(f"{path}: the row state is of another training than the table; take both from one checkpoint")
    rows = arrays.pop("rows", torch.zeros(1))
    check_row_ids(rows, table.num_rows)
    if {array.shape[0] for array in arrays.values()} - {rows.numel()}:
        raise ValueError(f"{path}: {sorted(arrays)} must have {rows.numel()} entries, one for each of its rows")
    return rows, arrays
