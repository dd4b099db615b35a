"""Checksums of the blocks of a file, in a sidecar FILE.sums: which bytes have changed since, and whose rows they are.

JSON: {format_version, algorithm, file_bytes, block_bytes, blocks: [hexadecimal BLAKE2b of 16 bytes, ...]}

A table that is written again loses its sidecar, since that is of the old bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from byrote.tables.files.headers import BYTES, check_fields, parse_object, read_header
from byrote.tables.log.disk import naming

FORMAT_VERSION, ALGORITHM, DIGEST_BYTES = 1, "blake2b-16", 16
BLOCK_BYTES = 1 << 20
THREADS = 4  # hashing holds no GIL
Report = Callable[[int, int], None]  # blocks done, blocks in all


@dataclass(frozen=True)
class Damage:
    """A block whose bytes [begin, end) are not those of the sidecar; `rows`: of each tensor, the first and last row
    that lie in it, at least in part. Without any, the block is of the header.
    """

    number: int
    begin: int
    end: int
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sums")


def discard(path: Path) -> None:
    """Remove the sidecar of a file that is about to change."""
    sidecar(path).unlink(missing_ok=True)


def write_sums(path: Path, report: Report = lambda done, total: None) -> Path:
    """Write the sidecar of the file as it is now. ValueError where there is one."""
    target = sidecar(path)
    if target.exists():
        raise ValueError(f"{target} is there already: verify against it, or delete it if the file was meant to change")
    _check_is_file(path)
    content = {
        "format_version": FORMAT_VERSION,
        "algorithm": ALGORITHM,
        "file_bytes": path.stat().st_size,
        "block_bytes": BLOCK_BYTES,
        "blocks": list(_digests(path, path.stat().st_size, BLOCK_BYTES, report)),
    }
    temporary = target.with_name(target.name + ".tmp")
    with naming(target):
        temporary.write_text(json.dumps(content) + "\n", "utf-8")
    os.replace(temporary, target)
    return target


def verify(path: Path, report: Report = lambda done, total: None) -> list[Damage]:
    """The blocks that have changed, or are no longer there, since the sidecar was written."""
    _check_is_file(path)
    size, block, expected = _read_sums(path)
    found = list(_digests(path, size, block, report))
    damaged = [number for number, (now, then) in enumerate(zip(found, expected, strict=True)) if now != then]
    if path.stat().st_size > size and (not damaged or damaged[-1] != len(expected) - 1):
        damaged.append(len(expected) - 1)  # what was added stands behind the last block
    ranges = [(number, block * number, min(block * (number + 1), size)) for number in damaged]
    return [Damage(number, begin, end, _rows(path, begin, end)) for number, begin, end in ranges]


def _read_sums(path: Path) -> tuple[int, int, list[str]]:
    """(bytes of the file, bytes of a block, digests)"""
    source = sidecar(path)
    if not source.is_file():
        raise ValueError(f"{path} has no checksums beside it: byrote table verify --write {path} makes {source.name}")
    content = parse_object(source.read_bytes(), str(source))
    check_fields(content, {"format_version": int, "algorithm": str}, str(source))
    version, algorithm = content["format_version"], content["algorithm"]
    if (version, algorithm) != (FORMAT_VERSION, ALGORITHM):
        raise ValueError(f"{source}: {algorithm} in version {version}, this byrote reads {ALGORITHM} in version 1")
    check_fields(content, {"file_bytes": int, "block_bytes": int, "blocks": list}, str(source))
    size, block, blocks = content["file_bytes"], content["block_bytes"], content["blocks"]
    whole = block > 0 and len(blocks) == -(-size // block) and all(isinstance(digest, str) for digest in blocks)
    if not whole:
        raise ValueError(f"{source} is damaged: {len(blocks)} blocks of {block} bytes are no file of {size}")
    return size, block, blocks


def _digests(path: Path, size: int, block: int, report: Report) -> Iterator[str]:
    """Of each block of the first `size` bytes; one that ends early differs from any that does not."""
    total, window, found = -(-size // block), 16 * THREADS, path.stat().st_size
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:

        def digest(number: int) -> str:
            end = min(size, block * (number + 1), found)  # a sidecar that is wrong asks for no memory
            content = os.pread(file.fileno(), max(0, end - number * block), number * block)
            return hashlib.blake2b(content, digest_size=DIGEST_BYTES).hexdigest()

        for begin in range(0, total, window):
            numbers = range(begin, min(begin + window, total))
            yield from pool.map(digest, numbers)
            report(numbers[-1] + 1, total)


def _rows(path: Path, begin: int, end: int) -> dict[str, tuple[int, int]]:
    try:
        tensors, _ = read_header(path, check_size=False)
    except ValueError:
        return {}  # the header itself is damaged
    rows = {}
    for name, place in tensors.items():
        first, last = max(begin, place.start), min(end, place.start + place.num_bytes) - 1
        if first <= last:
            size = place.num_bytes // place.shape[0] if place.shape else BYTES[place.dtype]
            rows[name] = ((first - place.start) // size, (last - place.start) // size)
    return rows


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; checksums are of one file, such as FOLDER/table-1.safetensors")
