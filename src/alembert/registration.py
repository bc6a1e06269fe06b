"""Makes transformers' Auto classes know Alembert's models, without importing transformers before anyone needs it.

The models register themselves when `alembert.models` is imported. This module sees to it that this happens in time:
at once where transformers' Auto classes are loaded already, else right after the import that loads them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_AUTO_CLASSES = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Registers the models now if transformers' Auto classes are loaded, else when they will have been."""
    if _AUTO_CLASSES in sys.modules:
        _register()
    elif not any(isinstance(finder, _AutoClassesWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoClassesWatcher())


def _register() -> None:
    # transformers also serves as a library of tokenizers; then there is no model to register.
    if find_spec("torch") is not None:
        import_module("alembert.models")


class _AutoClassesWatcher(MetaPathFinder):
    """Calls `_register` when the outermost import of transformers that loaded the Auto classes has ended.

    Not before: in the middle of it, modules that the models need may be half executed.
    """

    def __init__(self) -> None:
        self._depth = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers" and not fullname.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Any) -> None:
        execute: Callable[[ModuleType], None] = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            self._depth.value = getattr(self._depth, "value", 0) + 1
            try:
                execute(module)
            finally:
                self._depth.value -= 1
            if self._depth.value == 0 and _AUTO_CLASSES in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        loader.exec_module = exec_module
