"""Files of tables of ours: plain safetensors, readable by anything.

- rows:  tensor `rows` [R, W], or [R, B] of bytes for the packed codecs
- state: tensor `rows` [U] (ascending row ids) and one tensor a field [U, ...]
- both:  metadata `byrote` = JSON {format_version, digest, generation, identity, num_rows, width, codec}; `identity` is
         16 hexadecimal digits, and absent in files that are older than it

They are written piece by piece: what they hold need not fit into memory. A `RamTable` reads them whole, a `FileTable`
in place.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from byrote.tables.codecs import CODECS
from byrote.tables.files.checksums import discard
from byrote.tables.files.headers import check_fields, parse_object, read_header
from byrote.tables.log.disk import naming
from byrote.tables.table import UNKNOWN, RowState, check_row_ids

FORMAT_VERSION = 1
HEADER = {"digest": str, "generation": int, "num_rows": int, "width": int, "codec": str}
NAMES = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
Pieces = tuple[torch.dtype, tuple[int, ...], Callable[[], Iterator[Tensor]]]


def header_of(table: Any) -> dict[str, Any]:
    about = {name: getattr(table, name) for name in HEADER}
    identity = {"identity": f"{table.identity:016x}"} if table.identity != UNKNOWN else {}
    return {"format_version": FORMAT_VERSION, **about, **identity}


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
    if "byrote" not in metadata:
        raise ValueError(
            f"{path}: its header has no metadata 'byrote', which says what table it is; a tool that saves tensors anew "
            "leaves it out: take the file that save_pretrained wrote"
        )
    source = f"{path}: metadata 'byrote'"
    header = parse_object(metadata["byrote"].encode(), source)
    if header.get("format_version") != FORMAT_VERSION:
        version = header.get("format_version")
        raise ValueError(f"{path}: table format_version {version}, this byrote reads {FORMAT_VERSION}")
    if missing := [name for name in HEADER if name not in header]:
        raise ValueError(f"{path}: the header lacks {missing}; write tables with save_pretrained or Table.save")
    check_fields(header, HEADER, source)
    if not header["num_rows"] or not header["width"]:
        raise ValueError(f"{source} is damaged: a table of [{header['num_rows']}, {header['width']}] holds no rows")
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
    header = table_header(path, read_header(path)[1])
    try:
        with safe_open(path, framework="pt") as file:
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
    rows = row_ids(path, arrays, table.num_rows)
    for name, array in arrays.items():
        if array.dtype != torch.float32 or array.shape[:1] != rows.shape:
            raise ValueError(
                f"{path}: row state {name!r} must be float32 with {len(rows)} entries, one for each of its rows, got "
                f"{array.dtype} {list(array.shape)}"
            )
    return rows, arrays


def row_ids(path: Path, arrays: dict[str, Tensor], num_rows: int) -> Tensor:
    """Take the ids `rows` [U] of a table of `num_rows` rows out of `arrays`; ValueError unless they ascend."""
    if "rows" not in arrays or arrays["rows"].dim() != 1:
        raise ValueError(f"{path}: there must be a tensor 'rows' [U] of row ids; it holds {sorted(arrays)}")
    rows = arrays.pop("rows")
    try:
        check_row_ids(rows, num_rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if unordered := (rows[1:] <= rows[:-1]).nonzero().flatten().tolist():
        at = unordered[0]
        raise ValueError(
            f"{path}: row ids must ascend and be unique, but entries {at} and {at + 1} are {int(rows[at])} and "
            f"{int(rows[at + 1])}; take the file as it was written"
        )
    return rows


def stream(path: Path, arrays: Mapping[str, Pieces], header: dict[str, Any]) -> None:
    """A file of name -> (dtype, shape, pieces of it in order); it has its name when it is whole."""
    content: dict[str, Any] = {"__metadata__": {"byrote": json.dumps(header)}}
    at = 0
    for name, (dtype, shape, _) in arrays.items():
        end = at + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with naming(path), open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, pieces in arrays.values():
            for piece in pieces():
                file.write(as_bytes(piece, piece[:1].nbytes).data)
    discard(path)
    os.replace(temporary, path)


def as_bytes(values: Tensor, size: int) -> np.ndarray:
    """The numbers of each entry as `size` bytes, [U, size]."""
    if not len(values):
        return np.empty((0, size), np.uint8)  # which torch does not view
    return values.contiguous().flatten().view(torch.uint8).numpy().reshape(len(values), size)
