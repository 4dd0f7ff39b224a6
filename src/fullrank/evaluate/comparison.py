"""`compare`: several runs against a baseline and against each other, tested together."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from fullrank.core.corpus import Qrels
from fullrank.core.errors import InputError, require
from fullrank.core.run import Run
from fullrank.core.table import Cell, Table
from fullrank.evaluate.bootstrap import column_intervals
from fullrank.evaluate.contrast import Contrast, contrast
from fullrank.evaluate.evaluation import Evaluation, Evaluator
from fullrank.evaluate.floors import Labels, labels_of
from fullrank.evaluate.metrics import DEFAULT_METRICS
from fullrank.evaluate.significance import column_p_values, holm


@dataclass(frozen=True, slots=True)
class Difference:
    """How much higher one system's mean is than another's.

    Attributes
    ----------
    against
        Name of the other system.
    mean, lower, upper
        Difference of means, and its bootstrap interval.
    p, p_holm
        Of the paired randomisation test; and after Holm's correction over all tests of the
        comparison.
    """

    against: str
    mean: float
    lower: float
    upper: float
    p: float
    p_holm: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.lower:+.4f}, {self.upper:+.4f}]"


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One system under one metric; ``baseline`` and ``previous`` are None where there is none."""

    metric: str
    system: str
    mean: float
    baseline: Difference | None
    previous: Difference | None


class _Pair(NamedTuple):
    metric: str
    system: str
    against: str


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes
    ----------
    evaluations
        Name of a system -> its :class:`Evaluation`, in the order given.
    rows
        Metric by metric, the systems in the order given.
    baseline
        Name of the system that all are held against.
    queries, clusters
        Number of judged queries, and of clusters drawn (None: queries are drawn).
    tests
        Over how many p-values were corrected; two that test the same thing count once.
    confidence
        Of the intervals.
    """

    evaluations: Mapping[str, Evaluation]
    rows: tuple[ComparisonRow, ...]
    baseline: str
    queries: int
    clusters: int | None
    tests: int
    confidence: float

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order given."""
        return tuple(next(iter(self.evaluations.values())).per_query)

    def row(self, system: str, metric: str | None = None) -> ComparisonRow:
        """Return one system's row; the first metric's unless another is named."""
        wanted = self.metrics[0] if metric is None else metric
        for row in self.rows:
            if (row.system, row.metric) == (system, wanted):
                return row
        raise InputError(
            f"no {wanted!r} of {system!r}; there are {', '.join(self.evaluations)} "
            f"under {', '.join(self.metrics)}"
        )

    def table(self, metric: str | None = None) -> Table:
        """Return means, differences with intervals and corrected p-values.

        Parameters
        ----------
        metric
            Show this one only; None shows all, one below the other.
        """
        if metric is not None and metric not in self.metrics:
            raise InputError(f"{metric!r} was not measured; there is {', '.join(self.metrics)}")
        against = [f"vs {self.baseline}", "vs previous"]
        columns = ["system", metric or "mean", *(c for a in against for c in (a, f"p {a}"))]
        rows: list[list[Cell]] = []
        for row in self.rows:
            if metric in (None, row.metric):
                cells: list[Cell] = [] if metric else [row.metric]
                cells += [row.system, row.mean]
                for difference in (row.baseline, row.previous):
                    cells += [
                        str(difference) if difference else None,
                        difference.p_holm if difference else None,
                    ]
                rows.append(cells)
        return Table(
            columns if metric else ["metric", *columns],
            rows,
            title=self._title(),
            formats={metric or "mean": ".4f", **{f"p {a}": _p_text for a in against}},
        )

    def means(self) -> Table:
        """Return the means alone: a row a system, a column a metric."""
        return Table(
            ["system", *self.metrics],
            [[name, *evaluation.mean.values()] for name, evaluation in self.evaluations.items()],
            title=f"Mean over {self.queries} queries",
            formats=dict.fromkeys(self.metrics, ".4f"),
        )

    def contrast(
        self, system: str, against: str | None = None, metric: str | None = None, *, top: int = 10
    ) -> Contrast:
        """Compare two of the systems query by query; the baseline is the default opponent."""
        wanted = self.metrics[0] if metric is None else metric
        for name in (system, against or self.baseline):
            self.row(name, wanted)
        other = self.evaluations[against or self.baseline]
        return contrast(
            self.evaluations[system].per_query[wanted], other.per_query[wanted], top=top
        )

    def frame(self) -> Any:
        """Return all numbers as a pandas data frame, a row a metric and system."""
        pandas = require("pandas", extra="search")
        return pandas.json_normalize([asdict(row) for row in self.rows], sep="_")

    def to_json(self) -> str:
        """Return settings and rows as a JSON text."""
        return json.dumps(
            {
                "baseline": self.baseline,
                "queries": self.queries,
                "clusters": self.clusters,
                "tests": self.tests,
                "confidence": self.confidence,
                "rows": [asdict(row) for row in self.rows],
            },
            indent=1,
        )

    def _title(self) -> str:
        drawn = "" if self.clusters is None else f" in {self.clusters} clusters"
        return (
            f"{self.queries} queries{drawn}; differences with {100 * self.confidence:g}% bootstrap "
            f"intervals; p of paired randomisation, Holm-corrected over {self.tests} tests"
        )


def _p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def compare(
    runs: Sequence[Run] | Mapping[str, Run],
    qrels: Qrels,
    metrics: Iterable[str] = DEFAULT_METRICS,
    *,
    baseline: str | None = None,
    clusters: Labels | None = None,
    permutations: int = 10_000,
    samples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Measure several runs and test each against a baseline and against the one before it.

    Parameters
    ----------
    runs
        Runs with different names, or name -> run.
    qrels
        Query id -> {document id: grade}; see :func:`evaluate` for what counts.
    metrics
        Names as ir-measures writes them.
    baseline
        Name of the run that all others are held against; the first by default.
    clusters
        Query id -> label (or a label for each query of ``qrels``, in order): the bootstrap draws
        whole clusters and the randomisation test swaps them as one. An empty mapping is None.
    permutations
        Swaps of the randomisation test.
    samples
        Draws of the bootstrap.
    confidence
        Of the intervals.
    seed
        Of both.

    Returns
    -------
    Comparison
        ``.table()``, ``.rows``, ``.contrast(system)``, ``.to_json()``.

    Raises
    ------
    InputError
        On no runs, a name used twice, an unknown baseline or metric, judgements or runs that
        :func:`evaluate` refuses, queries without a cluster, or fewer than two of either.

    Examples
    --------
    >>> qrels = {f"q{i}": {"d": 1} for i in range(8)}
    >>> first = Run.from_dict({q: {"x": 2.0, "d": 1.0} for q in qrels}, name="first")
    >>> second = Run.from_dict({q: {"d": 1.0} for q in qrels}, name="second")
    >>> print(compare([first, second], qrels, ["RR"]).row("second").baseline)
    +0.5000 [+0.5000, +0.5000]
    """
    named = _named(runs)
    first = next(iter(named)) if baseline is None else baseline
    if first not in named:
        raise InputError(f"the baseline {first!r} is none of the runs: {', '.join(named)}")
    evaluator = Evaluator(qrels, metrics)
    evaluations = {name: evaluator(run.named(name)) for name, run in named.items()}
    labels = labels_of(evaluator.queries, clusters)
    pairs = _pairs(evaluator.metrics, list(named), first)
    differences = _differences(evaluations, pairs, labels, permutations, samples, confidence, seed)
    rows = []
    for metric in evaluator.metrics:
        previous = None
        for name, evaluation in evaluations.items():
            rows.append(
                ComparisonRow(
                    metric,
                    name,
                    evaluation.mean[metric],
                    differences.get(_Pair(metric, name, first)),
                    differences.get(_Pair(metric, name, previous)) if previous else None,
                )
            )
            previous = name
    return Comparison(
        evaluations,
        tuple(rows),
        first,
        len(evaluator.queries),
        None if labels is None else len(set(labels)),
        len({(p.metric, frozenset(p[1:])) for p in pairs}),
        confidence,
    )


def _named(runs: Sequence[Run] | Mapping[str, Run]) -> dict[str, Run]:
    if isinstance(runs, Run):
        raise InputError("one run was given; a comparison needs a list of runs, or name -> run")
    if isinstance(runs, Mapping):
        named = dict(runs)
    else:
        named = {}
        for number, run in enumerate(runs):
            name = getattr(run, "name", f"run {number}")
            if named.setdefault(name, run) is not run:
                raise InputError(
                    f"two runs are named {name!r}; tell them apart with run.named(...), "
                    "or pass name -> run"
                )
    for name, run in named.items():
        if not isinstance(run, Run):
            raise InputError(
                f"{name!r} is a {type(run).__name__}, not a Run; see Run.from_dict, Run.from_trec"
            )
    if not named:
        raise InputError("there are no runs to compare")
    return named


def _pairs(metrics: Sequence[str], names: Sequence[str], baseline: str) -> list[_Pair]:
    """Who is held against whom; the previous row may be the baseline, which is one test."""
    pairs = {
        _Pair(metric, name, against): None
        for metric in metrics
        for previous, name in zip([None, *names[:-1]], names, strict=True)
        for against in (baseline, previous)
        if against not in (None, name)
    }
    return list(pairs)


def _differences(
    evaluations: Mapping[str, Evaluation],
    pairs: Sequence[_Pair],
    labels: Sequence[Hashable] | None,
    permutations: int,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[_Pair, Difference]:
    """Interval and p-value of every pair, from the same draws for all."""
    if not pairs:
        return {}
    columns = np.column_stack(
        [
            evaluations[pair.system].values(pair.metric)
            - evaluations[pair.against].values(pair.metric)
            for pair in pairs
        ]
    )
    intervals = column_intervals(columns, labels, confidence, samples, seed)
    p_values = column_p_values(columns, labels, permutations, seed)
    # A before B is the same test as B before A.
    unique = {(p.metric, frozenset(p[1:])): value for p, value in zip(pairs, p_values, strict=True)}
    corrected = dict(zip(unique, holm(unique.values()), strict=True))
    return {
        pair: Difference(pair.against, *interval, p, corrected[pair.metric, frozenset(pair[1:])])
        for pair, interval, p in zip(pairs, intervals, p_values, strict=True)
    }
