"""`evaluate`: a run against judgements."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fullrank.core.corpus import Qrels
from fullrank.core.errors import InputError, require
from fullrank.core.run import Run
from fullrank.core.table import Table
from fullrank.evaluate.metrics import DEFAULT_METRICS, parse_metric

# trec_eval counts documents by grade in arrays that are as long as the largest one.
_LARGEST_GRADE = 1_000_000


@dataclass(frozen=True)
class Evaluation:
    """What a run is worth, query by query.

    Attributes
    ----------
    name
        Of the run.
    per_query
        Metric -> query id -> value, over every query that has judgements, in their order.
    """

    name: str
    per_query: Mapping[str, Mapping[str, float]]

    @property
    def queries(self) -> tuple[str, ...]:
        """Ids of the judged queries."""
        return tuple(next(iter(self.per_query.values())))

    @cached_property
    def mean(self) -> dict[str, float]:
        """Metric -> mean over the judged queries."""
        return {
            metric: math.fsum(values.values()) / len(values)
            for metric, values in self.per_query.items()
        }

    def values(self, metric: str) -> npt.NDArray[np.float64]:
        """(n,) values of one metric in the order of :attr:`queries`."""
        if metric not in self.per_query:
            raise InputError(f"{metric!r} was not measured; there is {', '.join(self.per_query)}")
        return np.fromiter(self.per_query[metric].values(), np.float64)

    def table(self) -> Table:
        """Return the means as a table of one row."""
        return Table(
            ["system", *self.mean],
            [[self.name, *self.mean.values()]],
            title=f"Mean over {len(self.queries)} queries",
            formats=dict.fromkeys(self.mean, ".4f"),
        )

    def to_json(self) -> str:
        """Return means and values of every query as a JSON text."""
        return json.dumps(
            {
                "system": self.name,
                "queries": len(self.queries),
                "mean": self.mean,
                "per_query": {m: dict(v) for m, v in self.per_query.items()},
            },
            indent=1,
        )


class Evaluator:
    """Judgements and metrics made ready once, for any number of runs.

    Parameters
    ----------
    qrels
        Query id -> {document id: grade}; integers, below 1 means not relevant.
    metrics
        Names as ir-measures writes them.

    Raises
    ------
    InputError
        On empty judgements, ids that are no strings, grades that are no integers, or an unknown
        metric.

    Examples
    --------
    >>> evaluator = Evaluator({"q1": {"a": 1}, "q2": {"b": 1}}, ["RR"])
    >>> evaluator(Run.from_dict({"q1": {"x": 2.0, "a": 1.0}})).per_query
    {'RR': {'q1': 0.5, 'q2': 0.0}}
    """

    def __init__(self, qrels: Qrels, metrics: Iterable[str] = DEFAULT_METRICS) -> None:
        names = [metrics] if isinstance(metrics, str) else list(dict.fromkeys(metrics))
        if not names:
            raise InputError("no metric was named; give at least one, e.g. 'nDCG@10'")
        # Two names of one measure (RR and MRR) are one object to ir-measures.
        self._names: dict[Any, list[str]] = {}
        for name in names:
            self._names.setdefault(parse_metric(name), []).append(name)
        self.metrics = tuple(names)
        judged = _checked(qrels)
        self.queries = tuple(qrels)
        # Numbers in place of the queries' own ids: gdeval (ERR) takes no others.
        self._numbers = {q: str(n) for n, q in enumerate(self.queries, 1) if q in judged}
        ir_measures = require("ir_measures", extra="search")
        try:
            self._measures = ir_measures.evaluator(
                list(self._names), {number: judged[q] for q, number in self._numbers.items()}
            )
        except (TypeError, ValueError) as error:  # AP(rel=0) is a TypeError
            raise InputError(f"ir-measures cannot compute this here: {error}") from error

    def __call__(self, run: Run | Mapping[str, Mapping[str, float]]) -> Evaluation:
        """Measure one run.

        Raises
        ------
        InputError
            When the run answers none of the judged queries.
        """
        if not isinstance(run, Run):
            run = Run.from_dict(run)
        answered = run.select(self.queries)
        if not answered:
            raise InputError(
                f"the run {run.name!r} answers none of the {len(self.queries)} judged queries: "
                f"it has ids such as {next(iter(run), None)!r}, "
                f"the judgements such as {self.queries[0]!r}"
            )
        per_query = {name: dict.fromkeys(self.queries, 0.0) for name in self.metrics}
        # Without results there is nothing to measure, and some measures divide by their number.
        scores = {
            self._numbers[q]: s
            for q, s in answered.to_dict(strict=True).items()
            if s and q in self._numbers
        }
        try:
            for value in self._measures.iter_calc(scores):
                for name in self._names[value.measure]:
                    per_query[name][self.queries[int(value.query_id) - 1]] = float(value.value)
        except subprocess.CalledProcessError as error:
            raise InputError(
                f"gdeval, which computes one of {', '.join(self.metrics)}, failed; it takes grades "
                "up to 4"
            ) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"ir-measures failed to compute {', '.join(self.metrics)}: {error}"
            ) from error
        return Evaluation(run.name, per_query)


def _checked(qrels: Qrels) -> dict[str, dict[str, int]]:
    """Judgements as plain dicts of plain integers, without queries that have none."""
    if not qrels:
        raise InputError("the judgements are empty; give {query id: {document id: grade}}")
    judged: dict[str, dict[str, int]] = {}
    for query, grades in qrels.items():
        plain = {}
        for identifier in (query, *grades):
            if not isinstance(identifier, str):
                raise InputError(
                    f"query {query!r}: the id {identifier!r} is a {type(identifier).__name__}; "
                    "ids are strings"
                )
        for document, grade in grades.items():
            try:
                whole = int(grade)
            except (TypeError, ValueError, OverflowError):
                whole = None
            if whole is None or whole != grade or abs(whole) > _LARGEST_GRADE:
                raise InputError(
                    f"query {query!r}: document {document!r} has the grade {grade!r}; "
                    f"an integer up to {_LARGEST_GRADE:,} is expected"
                )
            plain[document] = whole
        if plain:
            # Where no grade of a query reaches 0, trec_eval reads beyond its arrays.
            least = 0 if max(plain.values()) < 0 else -_LARGEST_GRADE
            judged[query] = {document: max(grade, least) for document, grade in plain.items()}
    return judged


def evaluate(
    run: Run | Mapping[str, Mapping[str, float]],
    qrels: Qrels,
    metrics: Iterable[str] = DEFAULT_METRICS,
) -> Evaluation:
    """Measure a run, with ir-measures, in exactly the order that it shows.

    Averages run over every query in ``qrels``, as ``trec_eval -c`` does: one that the run does
    not answer counts 0, one without any relevant document counts 0 too, and queries of the run
    without judgements are left out. Documents without a judgement are not relevant.

    Parameters
    ----------
    run
        A :class:`~fullrank.core.Run`, or ``{query: {document: score}}``.
    qrels
        Query id -> {document id: grade}.
    metrics
        Names as ir-measures writes them: ``nDCG@10``, ``AP``, ``RR``, ``R@100``, ``P@10``.

    Returns
    -------
    Evaluation
        ``.mean``, ``.per_query``, ``.table()``, ``.to_json()``.

    Raises
    ------
    InputError
        On an unknown metric, empty or malformed judgements, or a run without any judged query.
    MissingExtraError
        Without ir-measures (extra ``search``).

    Examples
    --------
    >>> result = evaluate({"q1": {"a": 2.0, "b": 1.0}}, {"q1": {"b": 1}, "q2": {"a": 1}}, ["RR"])
    >>> result.mean, result.per_query["RR"]
    ({'RR': 0.25}, {'q1': 0.5, 'q2': 0.0})
    """
    return Evaluator(qrels, metrics)(run)
