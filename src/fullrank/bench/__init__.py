"""Benchmarks that compare methods on equal terms: same models, texts, steps and seeds."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.bench.adapter_board import AdapterBoard as AdapterBoard
    from fullrank.bench.adapter_board import AdapterRow as AdapterRow
    from fullrank.bench.adapter_sizes import AdapterSize as AdapterSize
    from fullrank.bench.adapters import bench_adapters as bench_adapters
    from fullrank.bench.leaderboard import Leaderboard as Leaderboard
    from fullrank.bench.leaderboard import Row as Row
    from fullrank.bench.optimizers import bench_optimizers as bench_optimizers
    from fullrank.bench.runs import Job as Job
    from fullrank.bench.runs import RunStore as RunStore
    from fullrank.bench.search import RateSearch as RateSearch
    from fullrank.bench.shrink import bench_shrink as bench_shrink
    from fullrank.bench.shrink_sizes import ShrinkSize as ShrinkSize
    from fullrank.bench.sizes import Size as Size
    from fullrank.bench.workers import run_jobs as run_jobs

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["AdapterBoard", "AdapterRow"], "adapter_board"),
        "AdapterSize": "adapter_sizes",
        "bench_adapters": "adapters",
        **dict.fromkeys(["Leaderboard", "Row"], "leaderboard"),
        "bench_optimizers": "optimizers",
        **dict.fromkeys(["Job", "RunStore"], "runs"),
        "RateSearch": "search",
        "bench_shrink": "shrink",
        "ShrinkSize": "shrink_sizes",
        "Size": "sizes",
        "run_jobs": "workers",
    },
)
