"""Changes of files that survive a crash: all that a log does to the disk goes through here.

    replace_json(path, content)    there whole or not at all; when it returns, it stays
    write_all(file, data, at)      bytes of an open file
    sync_file(file)                the bytes stay
    sync_folder(folder)            names in it, new or deleted, stay
    naming(path)                   a write that fails says where: a full disk names no file of itself
    lock(path)                     flocked by who holds the open file that it returns, until that is closed or gone

What is not synced may be lost, in part and in any order, by a crash of the machine; not by one of the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from byrote.tables.files.headers import check_fields, parse_object


def replace_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        with naming(path):
            write_all(file, json.dumps(content).encode(), 0)
            os.fsync(file)
    finally:
        os.close(file)
    os.replace(temporary, path)
    sync_folder(path.parent)


def read_json(path: Path, version: int, kinds: Mapping[str, type], hint: str) -> dict[str, Any]:
    """An object of that format_version with fields of these kinds; ValueError where it is none, with the hint where
    nothing is there.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: {hint}") from None
    content = parse_object(text, str(path))
    if content.get("format_version") != version:
        raise ValueError(f"{path} is damaged, or of another format_version than {version}")
    check_fields(content, kinds, str(path))
    return content


def write_all(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Around what writes `path`: an OSError, or what safetensors and tokenizers make of one, names it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or isinstance(error, BrokenPipeError):
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except Exception as error:
        if "os error" not in str(error):  # as Rust says it
            raise
        raise OSError(errno.EIO, str(error), str(path)) from error


def sync_file(file: int) -> None:
    os.fsync(file)


def sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def delete(path: Path) -> None:
    os.unlink(path)


def truncate(path: Path, length: int) -> None:
    os.truncate(path, length)


def lock(path: Path) -> IO[bytes]:
    """ValueError where another holds it."""
    file = open(path, "ab")  # noqa: SIM115  open as long as it is locked
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ValueError(
            f"{path.parent} is open for writing in another process, or by another model of this one; "
            "a log has one writer: end that, or delete that model"
        ) from None
    return file
