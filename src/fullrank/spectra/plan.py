"""`RankPlan`, where users of `fullrank.spectra` look for it."""

from fullrank.core.plan import RankPlan as RankPlan
