"""What `fullrank shrink --floor` asks for, and which way it is better."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fullrank.core.errors import InputError

_FLOOR = re.compile(
    r"^\s*(?P<metric>[^<>=]+?)\s*(?P<way>[<>]=)\s*(?P<value>\d+(?:\.\d+)?)\s*(?P<percent>%?)\s*$"
)

# Metrics of language models, all losses, and of classifiers; retrieval's are ir-measures'.
LOSSES = {"bits per byte": "bits per byte", "bpb": "bits per byte", "perplexity": "perplexity"}
ACCURACY = "accuracy"


@dataclass(frozen=True)
class Floor:
    """A bound on a metric: ``relative`` counts against the original model's mean."""

    metric: str
    value: float
    relative: bool
    lower_is_better: bool = False


def parse_floor(text: str, own: bool = False) -> Floor:
    """Read ``'nDCG@10>=97%'`` (of the original), ``'RR>=0.42'`` (absolute) or a loss's ceiling.

    ``>=`` says that higher is better, ``<=`` that lower is. For metrics that are known here the
    sign must be the right one; for the user's ``own`` it is what tells.

    >>> parse_floor("nDCG@10>=97%")
    Floor(metric='nDCG@10', value=0.97, relative=True, lower_is_better=False)
    >>> parse_floor("bpb <= 103%")
    Floor(metric='bits per byte', value=1.03, relative=True, lower_is_better=True)
    """
    match = _FLOOR.match(text)
    if match is None:
        raise InputError(
            f"floor {text!r}; write it as 'nDCG@10>=97%', 'accuracy>=0.9' or 'bits per byte<=103%'"
        )
    lower, relative = match["way"] == "<=", bool(match["percent"])
    value = float(match["value"]) / (100 if relative else 1)
    metric = match["metric"] if own else _known(match["metric"])
    if not own and lower != (metric in LOSSES.values()):
        right = ">=" if lower else "<="
        better = "higher" if lower else "lower"
        raise InputError(f"floor {text!r}: {better} {metric} is better; write {metric}{right}...")
    if lower and (value < 1 if relative else value <= 0):
        raise InputError(f"floor {text!r}: the value is at least 100 %, or above 0")
    if not lower and not 0 < value <= 1 and (relative or not own):
        raise InputError(f"floor {text!r}: the value lies in (0, 100 %] or (0, 1]")
    return Floor(metric, value, relative, lower)


def _known(name: str) -> str:
    """Return the metric of that name: a language model's, a classifier's, or ir-measures'."""
    loss = LOSSES.get(name.lower())
    if loss is not None:
        return loss
    if name.lower() == ACCURACY:
        return name
    from fullrank.evaluate.metrics import parse_metric

    try:
        parse_metric(name)
    except InputError as error:
        raise InputError(
            f"floor: {error}. Language models have 'bits per byte' and 'perplexity', classifiers "
            "'accuracy'; --metric takes your own"
        ) from error
    return name
