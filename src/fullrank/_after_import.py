"""Do something at the moment another library is imported, and no sooner.

Registering with transformers or PEFT needs them and torch, which take seconds to import; `import
fullrank` must not. So a finder waits for the one module that owns the registry, and registers
right after it has run. If it is there already, it registers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _ThenLoader(Loader):
    """Runs a module as its own loader would, then something else."""

    def __init__(self, inner: Loader, then: Callable[[], object]) -> None:
        self.inner, self.then = inner, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        self.then()

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


class _Finder(MetaPathFinder):
    def __init__(self, module: str, then: Callable[[], object]) -> None:
        self.module, self.then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenLoader(spec.loader, self.then)
        return spec


def after_import(module: str, then: Callable[[], object]) -> None:
    """Call something now if a module is loaded, otherwise when it will be.

    Parameters
    ----------
    module
        Its full name.
    then
        Called once the module has run; harmless when called twice.
    """
    if module in sys.modules:
        then()
    elif not any(isinstance(f, _Finder) and f.module == module for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(module, then))
