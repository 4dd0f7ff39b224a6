"""Many small factorisations at once: one thread each, instead of many threads for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[tuple[Item, Result]]:
    """Yield ``(item, function(item))`` in order of completion.

    LAPACK's eigenvalue solvers hardly gain from a second thread, two of them side by side take
    half the time. There are as many workers as torch has threads. After an exception no further
    item is begun.

    Parameters
    ----------
    function
        Called in a worker thread, where torch uses one thread as well; most of its time should be
        spent in numpy, scipy or torch.
    items
        Longest first keeps all workers busy to the end.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    if workers < 2:
        for item in items:
            yield item, function(item)
        return
    with threadpool_limits(1, user_api="blas"):
        # torch's setting belongs to the thread that makes it, but MKL's follows every call.
        pool = ThreadPoolExecutor(workers, "fullrank-spectra", torch.set_num_threads, (1,))
        try:
            futures: dict[Future[Result], Item] = {pool.submit(function, i): i for i in items}
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
