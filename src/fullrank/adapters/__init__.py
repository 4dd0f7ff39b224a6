"""Train a little: adapters as citizens of PEFT."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.adapters.eva import EvaReport as EvaReport

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"EvaReport": "eva"})
