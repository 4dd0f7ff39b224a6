"""Names that come to be on first use, so that ``import fullrank`` stays instant."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def lazy_exports(
    package: str, exports: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Give a package ``__getattr__``, ``__dir__``, ``__all__`` for names living in its modules.

    Parameters
    ----------
    package
        ``__name__`` of the package.
    exports
        Public name -> the submodule that defines it, relative to the package (``"run"``), or
        ``""`` when the name *is* a submodule. A name may be spelled like the submodule that
        defines it (``{"capture": "capture"}``); it then always means what is defined there.
    """
    shadowed = {name for name, home in exports.items() if home == name}

    class Package(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            # Whoever imports a submodule first makes Python bind the module under its name.
            if name in shadowed and isinstance(value, ModuleType):
                value = getattr(value, name)
            super().__setattr__(name, value)

    if shadowed:
        sys.modules[package].__class__ = Package

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = exports[name]
        module = importlib.import_module(f"{package}.{home or name}")
        value = getattr(module, name) if home else module
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:  # noqa: N807
        return sorted({*vars(sys.modules[package]), *exports})

    return __getattr__, __dir__, sorted(exports)


def lazy_class(module: str, name: str, make: Callable[[], type[Any]]) -> Callable[[str], Any]:
    """Give a module ``__getattr__`` for a class whose base lives in an optional library.

    Parameters
    ----------
    module
        ``__name__`` of the module.
    name
        The class's.
    make
        Imports the library and returns the class; called when the class is first asked for.
    """

    def __getattr__(wanted: str) -> Any:  # noqa: N807
        if wanted != name:
            raise AttributeError(f"module {module!r} has no attribute {wanted!r}")
        made = make()
        # Pickling and documentation find it where it is imported from.
        made.__module__, made.__name__, made.__qualname__ = module, name, name
        setattr(sys.modules[module], name, made)
        return made

    return __getattr__
