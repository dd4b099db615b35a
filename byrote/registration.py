"""Hugging Face's Auto classes know byrote's models once both are imported, in either order, at no cost before that.

`byrote.models` registers its classes. It is imported at once where the Auto classes are there, and else by a finder on
`sys.meta_path` that lets their module load and then does it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

AUTO = "transformers.models.auto.configuration_auto"


def register_when_wanted() -> None:
    if AUTO in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WithModels())


class _WithModels(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    import byrote.models  # noqa: F401
