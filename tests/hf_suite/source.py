"""Where transformers' own tests come from: the source distribution on the package index, for wheels hold none.

    python -m tests.hf_suite.source        fetch the distribution of the installed version into .cache/, once

The distribution holds the files tests/test_*.py alone. Two classes that its common tests import lie in folders below:
the tests of exports are missing, and for those of `generate` stand byrote's own (tests.hf_suite.generation).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from byrote.data.packages import pypi_source

CACHE = Path(__file__).parents[2] / ".cache"
PACKAGE = "hf_tests"  # `tests` is ours


def fetch() -> Path:
    """The folder of the tests, fetched unless it is there."""
    name = f"transformers=={version('transformers')}"
    return pypi_source(name, CACHE) / name.replace("==", "-") / "tests"


def fetched() -> bool:
    return Path(CACHE, f"sdist-transformers--{version('transformers')}").exists()


def load(name: str) -> ModuleType:
    """A file of the tests as a module."""
    if PACKAGE not in sys.modules:
        from tests.hf_suite import generation

        _module(PACKAGE, fetch())
        _module(f"{PACKAGE}.exporters")
        _module(f"{PACKAGE}.exporters.test_export").ExportTesterMixin = object  # type: ignore[attr-defined]
        _module(f"{PACKAGE}.generation")
        sys.modules[f"{PACKAGE}.generation.test_utils"] = generation
    return importlib.import_module(f"{PACKAGE}.{name}")


def _module(name: str, *folders: Path) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = [str(folder) for folder in folders]
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    sys.modules[name] = module
    return module


if __name__ == "__main__":
    print(fetch())
