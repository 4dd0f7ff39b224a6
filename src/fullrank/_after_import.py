"""Teach transformers to load shrunk models, at the moment it is imported and no sooner.

Registering needs transformers and torch, which take seconds to import; `import fullrank` must
not. So a finder waits for the one module that owns the registry, and registers right after it
has run. If transformers is there already, it registers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


def _register() -> None:
    from fullrank.compress.hub import register

    register()


class _RegisterAfter(Loader):
    """Runs a module as its own loader would, then registers with it."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def register_on_import() -> None:
    """Register now if transformers' registry is loaded, otherwise when it will be."""
    if _REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
