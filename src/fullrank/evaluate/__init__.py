"""How good a ranking is, and whether one is better than another: metrics, intervals, tests."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.evaluate.bootstrap import Interval as Interval
    from fullrank.evaluate.bootstrap import bootstrap_interval as bootstrap_interval
    from fullrank.evaluate.comparison import Comparison as Comparison
    from fullrank.evaluate.comparison import ComparisonRow as ComparisonRow
    from fullrank.evaluate.comparison import Difference as Difference
    from fullrank.evaluate.comparison import compare as compare
    from fullrank.evaluate.contrast import Contrast as Contrast
    from fullrank.evaluate.contrast import QueryDifference as QueryDifference
    from fullrank.evaluate.contrast import contrast as contrast
    from fullrank.evaluate.evaluation import Evaluation as Evaluation
    from fullrank.evaluate.evaluation import Evaluator as Evaluator
    from fullrank.evaluate.evaluation import evaluate as evaluate
    from fullrank.evaluate.floors import FloorTest as FloorTest
    from fullrank.evaluate.floors import floor_test as floor_test
    from fullrank.evaluate.floors import smallest_floor as smallest_floor
    from fullrank.evaluate.metrics import DEFAULT_METRICS as DEFAULT_METRICS
    from fullrank.evaluate.metrics import parse_metric as parse_metric
    from fullrank.evaluate.significance import holm as holm
    from fullrank.evaluate.significance import randomisation_test as randomisation_test

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["Interval", "bootstrap_interval"], "bootstrap"),
        **dict.fromkeys(["Comparison", "ComparisonRow", "Difference", "compare"], "comparison"),
        **dict.fromkeys(["Contrast", "QueryDifference", "contrast"], "contrast"),
        **dict.fromkeys(["Evaluation", "Evaluator", "evaluate"], "evaluation"),
        **dict.fromkeys(["FloorTest", "floor_test", "smallest_floor"], "floors"),
        **dict.fromkeys(["DEFAULT_METRICS", "parse_metric"], "metrics"),
        **dict.fromkeys(["holm", "randomisation_test"], "significance"),
    },
)
