"""Packages whose names are imported on first use, so that ``import fullrank`` stays instant."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
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
        ``""`` when the name *is* a submodule.
    """

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
