"""fullrank: rank in both senses.

See a model's spectra (`fullrank.spectra`), train in less memory (`fullrank.optim`), shrink
(`fullrank.compress`), and order: search, rerank, evaluate (`fullrank.retrieval`,
`fullrank.evaluate`). Two nouns are shared: `RankPlan` and `Run`.

Importing this package is instant and imports no torch; its subpackages load on first use.
"""

from typing import TYPE_CHECKING

from fullrank._after_import import after_import
from fullrank._lazy import lazy_exports
from fullrank._version import __version__ as __version__

if TYPE_CHECKING:
    from fullrank.core.plan import RankPlan as RankPlan
    from fullrank.core.run import Run as Run

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "RankPlan": "core.plan",
        "Run": "core.run",
        **dict.fromkeys(
            [
                "catalogue",
                "compress",
                "core",
                "datasets",
                "demo",
                "evaluate",
                "linalg",
                "optim",
                "retrieval",
                "serve",
                "spectra",
                "training",
            ],
            "",
        ),
    },
)


def _register_with_transformers() -> None:
    from fullrank.compress.hub import register

    register()


# Shrunk models then load through plain `AutoModel.from_pretrained`.
after_import("transformers.quantizers.auto", _register_with_transformers)
