"""What every verb shares: the nouns `RankPlan` and `Run`, documents, moments, hooks, errors."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.core.capture import capture as capture
    from fullrank.core.corpus import Corpus as Corpus
    from fullrank.core.corpus import Document as Document
    from fullrank.core.corpus import Qrels as Qrels
    from fullrank.core.corpus import Queries as Queries
    from fullrank.core.errors import DivergedError as DivergedError
    from fullrank.core.errors import FullrankError as FullrankError
    from fullrank.core.errors import InputError as InputError
    from fullrank.core.errors import LockedError as LockedError
    from fullrank.core.errors import MissingExtraError as MissingExtraError
    from fullrank.core.errors import PlanError as PlanError
    from fullrank.core.errors import StoreError as StoreError
    from fullrank.core.errors import require as require
    from fullrank.core.files import atomic_write as atomic_write
    from fullrank.core.models import DEFAULT_ENCODER as DEFAULT_ENCODER
    from fullrank.core.models import load_model as load_model
    from fullrank.core.models import load_sentence_transformer as load_sentence_transformer
    from fullrank.core.models import quiet_transformers as quiet_transformers
    from fullrank.core.models import resolve_model as resolve_model
    from fullrank.core.moments import Moments as Moments
    from fullrank.core.names import canonical_name as canonical_name
    from fullrank.core.names import model_fingerprint as model_fingerprint
    from fullrank.core.names import named_linears as named_linears
    from fullrank.core.observe import observe_stages as observe_stages
    from fullrank.core.plan import RankPlan as RankPlan
    from fullrank.core.plan import Savings as Savings
    from fullrank.core.plan_entry import PlanEntry as PlanEntry
    from fullrank.core.plan_entry import break_even as break_even
    from fullrank.core.progress import progress as progress
    from fullrank.core.run import Ranking as Ranking
    from fullrank.core.run import Run as Run
    from fullrank.core.run import StageTrace as StageTrace
    from fullrank.core.table import Table as Table

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["Corpus", "Document", "Qrels", "Queries"], "corpus"),
        **dict.fromkeys(["RankPlan", "Savings"], "plan"),
        **dict.fromkeys(["PlanEntry", "break_even"], "plan_entry"),
        **dict.fromkeys(["Ranking", "Run", "StageTrace"], "run"),
        **dict.fromkeys(["canonical_name", "model_fingerprint", "named_linears"], "names"),
        **dict.fromkeys(
            [
                "DEFAULT_ENCODER",
                "load_model",
                "load_sentence_transformer",
                "quiet_transformers",
                "resolve_model",
            ],
            "models",
        ),
        **dict.fromkeys(
            [
                "DivergedError",
                "FullrankError",
                "InputError",
                "LockedError",
                "MissingExtraError",
                "PlanError",
                "StoreError",
                "require",
            ],
            "errors",
        ),
        "Moments": "moments",
        "atomic_write": "files",
        "capture": "capture",
        "observe_stages": "observe",
        "progress": "progress",
        "Table": "table",
    },
)
