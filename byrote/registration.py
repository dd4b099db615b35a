"""Hugging Face's Auto classes know byrote's models once both are imported, in either order, at no cost before that.

`byrote.models` registers its classes. It is imported at once where the Auto classes are there. Else a finder on
`sys.meta_path` waits until they are, and no module of transformers is half loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO = "transformers.models.auto.configuration_auto"


def register_when_wanted() -> None:
    """Register the models now, or as soon as the Auto classes are loaded."""
    if AUTO in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Waiting())


def _register() -> None:
    import byrote.models  # noqa: F401


class _Waiting(MetaPathFinder):
    def __init__(self) -> None:
        self.loading = 0  # modules of transformers

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "transformers":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_look(module: ModuleType) -> None:
            self.loading += 1
            try:
                load(module)
            finally:
                self.loading -= 1
            if not self.loading and AUTO in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = load_and_look  # type: ignore[method-assign]
        return spec
