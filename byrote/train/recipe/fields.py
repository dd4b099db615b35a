"""Keys and values of a recipe against the fields that declare them: an error names the key, the value and the remedy.

A type is an annotation: bool, int, float (an int will do), str, list[...], tuple[...], dict[str, ...], a union, None.
True and False are no numbers, and no number is infinite or NaN.
"""

import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable
from typing import Any

PYTHON = {"True": True, "False": False, "None": None}
NAMES = {bool: "a bool", int: "an int", float: "a finite number", str: "a string", type(None): "None"}


def parse(text: str) -> Any:
    """The value that is written in an override: TOML's, Python's True, False and None, or a bare word."""
    if text in PYTHON:
        return PYTHON[text]
    try:
        content = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return content["value"] if len(content) == 1 else text


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value that was read from TOML or JSON is of the type `wanted`."""
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        each = parts[:1] * len(value) if origin is list or parts[-1] is Ellipsis else parts
        return len(each) == len(value) and all(map(fits, value, each))
    if wanted is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is wanted


def describe(wanted: Any) -> str:
    origin, parts = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(describe, parts))
    if origin is dict:
        return "a table, {NAME = VALUE, ...}" if parts[1] is Any else f"a table of {describe(parts[1])} by name"
    if origin is tuple and Ellipsis not in parts:
        return f"a list of {len(parts)}: {', '.join(map(describe, parts))}"
    if origin in (list, tuple):
        return f"a list, each {describe(parts[0])}"
    return NAMES.get(wanted, str(wanted))


def check_value(key: str, value: Any, wanted: Any, example: str = "") -> None:
    if not fits(value, wanted):
        raise ValueError(f"{key} is {value!r}; it must be {describe(wanted)}{example}")


def check_names(content: Iterable[str], known: Iterable[str], prefix: str) -> None:
    """Every key must be a known one; `prefix` is the section, as it is written in an override."""
    known = list(known)
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(known)}."
            raise ValueError(f"unknown key {prefix}{key}: {hint}")
