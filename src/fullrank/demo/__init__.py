"""The main job: a search engine over this machine's documentation, by all four verbs."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.demo.config import DemoConfig as DemoConfig
    from fullrank.demo.run import run_demo as run_demo

__getattr__, __dir__, __all__ = lazy_exports(__name__, {"DemoConfig": "config", "run_demo": "run"})
