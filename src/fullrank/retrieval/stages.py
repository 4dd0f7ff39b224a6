"""Stages of a ranking pipeline, and the operators that compose them.

A stage maps ``(queries, run or None, corpus or None)`` to a :class:`~fullrank.core.Run`. The
operators are those that PyTerrier's users know:

======================  =============================================================
``a >> b``              b works on what a ranked
``a % k``               the best k of every query
``a + b``, ``2 * a``    linear combination; an item that one side lacks gets 0 from it
``a & b``, ``a | b``    sets: scores are undefined, so ``%``, ``+``, ``*`` refuse them
``rrf(a, b, k=60)``     reciprocal rank fusion
``weighted(a, b)``      weighted sum of normalised scores
======================  =============================================================

>>> from fullrank.retrieval import BM25, Corpus, rrf
>>> corpus = Corpus(["a", "b", "c"], ["cats purr", "dogs bark", "cats and dogs"])
>>> hybrid = rrf(BM25(corpus), BM25(corpus, k1=0.9, b=0.4)) % 2
>>> run = hybrid({"q1": "do cats purr"})
>>> run["q1"].ids.tolist()
['a', 'c']
>>> [stage.stage for stage in run.trace]
['bm25', 'bm25', 'rrf', '% 2']
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self, TypeAlias, overload

from fullrank.core.corpus import Corpus, Queries
from fullrank.core.errors import InputError
from fullrank.core.observe import stage_finished
from fullrank.core.run import Run
from fullrank.retrieval.fusion import (
    Normalise,
    check_weights,
    fuse_ranks,
    fuse_scores,
    intersect,
    unite,
)

Transform: TypeAlias = Callable[[Queries, Run | None, Corpus | None], Run]


class Stage(ABC):
    """One step of a ranking pipeline. Subclasses set ``name`` and implement :meth:`transform`.

    Attributes
    ----------
    name
        What tables show.
    scored
        Whether the scores of its runs mean something; those of sets do not.
    corpus
        The documents it knows, or None. A pipeline hands them to stages that need texts.
    """

    name: str = "stage"
    scored: bool = True
    corpus: Corpus | None = None
    # How its name is written inside another one's.
    _compound = False

    @abstractmethod
    def transform(self, queries: Queries, run: Run | None, corpus: Corpus | None) -> Run:
        """Rank; called through the stage itself, which checks and times.

        Parameters
        ----------
        queries
            Query id -> text.
        run
            What the stage before ranked, or None for the first one.
        corpus
            The documents, for stages that need their texts.
        """

    def __call__(
        self, queries: Queries, run: Run | None = None, corpus: Corpus | None = None
    ) -> Run:
        """Rank for some queries; the time it takes joins the run's trace.

        A trace holds every stage that took part, in order, with the milliseconds it took by
        itself, so that they add up to the time of the whole.
        """
        check_queries(queries)
        if corpus is None:
            corpus = self.corpus
        before = () if run is None else run.trace
        began = time.perf_counter()
        result = self.transform(queries, run, corpus)
        elapsed = (time.perf_counter() - began) * 1e3
        inside = result.trace
        if inside[: len(before)] == before:
            inside = inside[len(before) :]
        own = max(0.0, elapsed - math.fsum(s.milliseconds for s in inside))
        ranked = result.named(self.name).traced(self.name, own, (*before, *inside))
        stage_finished(self.name, ranked)
        return ranked

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def named(self, name: str) -> Self:
        """Return the same stage under another name."""
        other = copy.copy(self)
        other.name = name
        other._compound = False
        return other

    def __rshift__(self, other: Stage | Transform) -> Stage:
        return _Then(self, as_stage(other))

    def __rrshift__(self, other: Transform) -> Stage:
        return _Then(as_stage(other), self)

    def __mod__(self, k: int) -> Stage:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise InputError(f"'% {k!r}': a ranking is cut to a whole number of at least 1")
        return _Fusion(f"% {k}", f"{_inside(self)} % {k}", partial(_cut, k=k), self)

    def __add__(self, other: Stage) -> Stage:
        if not isinstance(other, Stage):
            return NotImplemented
        return _infix("+", partial(fuse_scores, weights=[1.0, 1.0]), self, other)

    def __mul__(self, factor: float) -> Stage:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        if not math.isfinite(factor):
            raise InputError(f"a stage is multiplied by a finite number, not by {factor}")
        scale = partial(fuse_scores, weights=[float(factor)])
        return _Fusion(f"{factor:g} *", f"{factor:g} * {_inside(self)}", scale, self)

    __rmul__ = __mul__

    def __and__(self, other: Stage) -> Stage:
        if not isinstance(other, Stage):
            return NotImplemented
        return _infix("&", intersect, self, other, sets=True)

    def __or__(self, other: Stage) -> Stage:
        if not isinstance(other, Stage):
            return NotImplemented
        return _infix("|", unite, self, other, sets=True)


def check_queries(queries: object) -> None:
    """Raise unless these are queries: id -> text."""
    if not isinstance(queries, Mapping):
        raise InputError(
            f"queries are a {type(queries).__name__}; give a mapping from query id to text, "
            "e.g. {'q1': 'what is a spectrum'}"
        )
    for identifier, text in queries.items():
        if not isinstance(identifier, str) or not isinstance(text, str):
            raise InputError(f"query {identifier!r}: id and text must be strings, not {text!r:.60}")


def as_stage(stage: Stage | Transform) -> Stage:
    """Return a stage; a function ``(queries, run, corpus) -> Run`` becomes one."""
    if isinstance(stage, Stage):
        return stage
    if callable(stage):
        return _Function(stage)
    raise InputError(
        f"a {type(stage).__name__} is no stage; give a Stage or a function (queries, run, corpus)"
    )


class _Function(Stage):
    """A function as a stage."""

    def __init__(self, function: Transform) -> None:
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def transform(self, queries: Queries, run: Run | None, corpus: Corpus | None) -> Run:
        return self._function(queries, run, corpus)


class _Composite(Stage):
    """A stage made of others, which are called one by one and traced by themselves."""

    _compound = True

    def __init__(self, name: str, *parts: Stage) -> None:
        self.name = name
        self.parts = parts
        self.corpus = next((p.corpus for p in parts if p.corpus is not None), None)

    def transform(self, queries: Queries, run: Run | None, corpus: Corpus | None) -> Run:
        return self(queries, run, corpus)


class _Then(_Composite):
    """``a >> b``."""

    def __init__(self, first: Stage, second: Stage) -> None:
        super().__init__(f"{first.name} >> {second.name}", first, second)
        self.scored = second.scored

    def __call__(
        self, queries: Queries, run: Run | None = None, corpus: Corpus | None = None
    ) -> Run:
        corpus = self.corpus if corpus is None else corpus
        for part in self.parts:
            run = part(queries, run, corpus)
        assert run is not None
        return run.named(self.name)


class _Fusion(_Composite):
    """What one or more stages rank, made into one run.

    Parameters
    ----------
    label
        What the trace calls it.
    name
        What it is called as a whole.
    fuse
        Runs, one a part -> run.
    parts
        The stages.
    sets
        Whether it makes a set, for which scores do not matter.
    """

    def __init__(
        self,
        label: str,
        name: str,
        fuse: Callable[[Sequence[Run]], Run],
        *parts: Stage,
        sets: bool = False,
    ) -> None:
        super().__init__(name, *parts)
        for part in parts:
            if not (sets or part.scored):
                raise InputError(
                    f"{label.strip(' *')!r} needs scores, and those of the set {part.name!r} are "
                    "undefined; rank it first, e.g. (a | b) >> reranker"
                )
        self.scored = not sets
        self._fuse, self._short = fuse, label

    def __call__(
        self, queries: Queries, run: Run | None = None, corpus: Corpus | None = None
    ) -> Run:
        corpus = self.corpus if corpus is None else corpus
        before = () if run is None else run.trace
        runs = [part(queries, run, corpus) for part in self.parts]
        inside = [stage for r in runs for stage in r.trace[len(before) :]]
        began = time.perf_counter()
        fused = self._fuse(runs)
        elapsed = (time.perf_counter() - began) * 1e3
        ranked = fused.named(self.name).traced(self._short, elapsed, (*before, *inside))
        stage_finished(self._short, ranked)
        return ranked


def _infix(
    symbol: str, fuse: Callable[[Sequence[Run]], Run], a: Stage, b: Stage, *, sets: bool = False
) -> Stage:
    return _Fusion(symbol, f"{_inside(a)} {symbol} {_inside(b)}", fuse, a, b, sets=sets)


def _inside(part: Stage) -> str:
    """Return how a stage is written inside a larger expression."""
    return f"({part.name})" if part._compound else part.name


def _cut(runs: Sequence[Run], k: int) -> Run:
    return runs[0].top(k)


@overload
def rrf(*parts: Run, k: float = 60) -> Run: ...
@overload
def rrf(*parts: Stage, k: float = 60) -> Stage: ...
def rrf(*parts: Stage | Run, k: float = 60) -> Stage | Run:
    """Reciprocal rank fusion: an item's score is the sum of ``1 / (k + rank)``, ranks from 1.

    Parameters
    ----------
    parts
        Two or more stages, which gives a stage, or runs, which gives a run.
    k
        How little the first ranks stand out; 60 as in Cormack et al. (2009).

    Raises
    ------
    InputError
        When stages and runs are mixed, for fewer than two, for a set, for a negative ``k``.

    Examples
    --------
    >>> a = Run({"q": (["x", "y"], [9.0, 8.0])})
    >>> b = Run({"q": (["y", "z"], [0.2, 0.1])})
    >>> rrf(a, b)["q"].ids.tolist()
    ['y', 'x', 'z']
    """
    if not (isinstance(k, (int, float)) and 0 <= k < math.inf):
        raise InputError(f"k of reciprocal rank fusion is {k!r}; it is a number of at least 0")
    return _call("rrf", parts, partial(fuse_ranks, k=k))


@overload
def weighted(
    *parts: Run, weights: Sequence[float] | None = None, normalise: Normalise | None = "minmax"
) -> Run: ...
@overload
def weighted(
    *parts: Stage, weights: Sequence[float] | None = None, normalise: Normalise | None = "minmax"
) -> Stage: ...
def weighted(
    *parts: Stage | Run,
    weights: Sequence[float] | None = None,
    normalise: Normalise | None = "minmax",
) -> Stage | Run:
    """Weighted sum of scores that are made comparable first.

    Parameters
    ----------
    parts
        Two or more stages, which gives a stage, or runs, which gives a run.
    weights
        One each; equal and adding up to 1 by default.
    normalise
        How each query's scores in each run are made comparable: ``"minmax"`` (default),
        ``"zscore"`` or None; see :func:`~fullrank.retrieval.fusion.fuse_scores`.

    Raises
    ------
    InputError
        When stages and runs are mixed, for fewer than two, for a set, for weights that do not fit.

    Examples
    --------
    >>> a = Run({"q": (["x", "y"], [30.0, 10.0])})
    >>> b = Run({"q": (["y", "z"], [0.9, 0.5])})
    >>> weighted(a, b, weights=[0.4, 0.6]).to_dict()
    {'q': {'y': 0.6, 'x': 0.4, 'z': 0.0}}
    """
    shares = [1 / max(len(parts), 1)] * len(parts) if weights is None else list(weights)
    check_weights(len(parts), shares, normalise)
    return _call("weighted", parts, partial(fuse_scores, weights=shares, normalise=normalise))


def _call(
    function: str, parts: Sequence[Stage | Run], fuse: Callable[[Sequence[Run]], Run]
) -> Stage | Run:
    runs = [part for part in parts if isinstance(part, Run)]
    stages = [part for part in parts if isinstance(part, Stage)]
    if len(parts) < 2 or len(parts) not in (len(runs), len(stages)):
        kinds = [type(part).__name__ for part in parts]
        raise InputError(f"{function} takes two or more stages, or two or more runs, not {kinds}")
    if runs:
        return fuse(runs)
    fusion = _Fusion(function, f"{function}({', '.join(p.name for p in stages)})", fuse, *stages)
    fusion._compound = False
    return fusion
