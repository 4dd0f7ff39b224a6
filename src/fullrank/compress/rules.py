"""The rank rules, where users of `fullrank.compress` look for them."""

from fullrank.compress.rules_threshold import ImportanceThreshold as ImportanceThreshold
from fullrank.compress.rules_threshold import NormalisedThreshold as NormalisedThreshold
from fullrank.core.plan import RankPlan as RankPlan
from fullrank.core.rank_rules import Energy as Energy
from fullrank.core.rank_rules import Fixed as Fixed
from fullrank.core.rank_rules import FractionOfBreakEven as FractionOfBreakEven
from fullrank.core.rank_rules import ParamRatio as ParamRatio
from fullrank.core.rank_rules import PerKind as PerKind
from fullrank.core.rank_rules import Value as Value
