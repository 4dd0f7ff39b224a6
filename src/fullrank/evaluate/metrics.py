"""Metric names, as ir-measures writes them."""

from __future__ import annotations

import ast
import difflib
import re
from typing import Any

from fullrank.core.errors import InputError, require

DEFAULT_METRICS = ("nDCG@10", "AP", "RR", "R@100")
"""What is measured unless something else is asked for."""

_SHAPE = re.compile(r"(?P<name>\w+)(?:\((?P<options>.*)\))?(?:@(?P<at>[^@()]+))?")
# Beyond it the C code under ir-measures wraps around, or crashes the process (a cutoff of 0).
_LARGEST_CUTOFF = 2**31 - 1


def parse_metric(name: str) -> Any:
    """Turn a name such as ``"nDCG@10"`` or ``"AP(rel=2)"`` into ir-measures' object.

    Only metrics that are averaged over queries are accepted: counts (``NumRet``) are not.

    Raises
    ------
    InputError
        On a name that ir-measures does not know (naming the close ones), an option it does not
        have, or a cutoff below 1.
    MissingExtraError
        Without ir-measures (extra ``search``).

    Examples
    --------
    >>> parse_metric("AP(rel=2)@100")
    AP(rel=2)@100
    >>> parse_metric("ndcg@10")
    Traceback (most recent call last):
    ...
    fullrank.core.errors.InputError: there is no metric 'ndcg@10'; did you mean nDCG?
    """
    ir_measures = require("ir_measures", extra="search")
    registry = ir_measures.measures.registry
    shape = _SHAPE.fullmatch(name.strip()) if isinstance(name, str) else None
    if shape is None:
        raise InputError(
            f"{name!r} is not the name of a metric; write it as ir-measures does, "
            "e.g. 'nDCG@10', 'AP', 'RR', 'R@100', 'AP(rel=2)'"
        )
    kind = registry.get(shape["name"])
    if kind is None:
        raise InputError(f"there is no metric {name!r}; {_suggestion(shape['name'], registry)}")
    try:
        options = _options(shape["options"] or "")
        if shape["at"] is not None:
            options[kind.AT_PARAM] = ast.literal_eval(shape["at"].strip())
        metric = kind(**options)
        metric.validate_params()
    except (AssertionError, SyntaxError, TypeError, ValueError) as error:
        raise InputError(
            f"metric {name!r} cannot be read ({_plain(error)}); {_usage(shape['name'], kind)}"
        ) from None
    cutoff = metric.params.get("cutoff", 1)
    if not 1 <= cutoff <= _LARGEST_CUTOFF or isinstance(cutoff, bool):
        raise InputError(f"metric {name!r} has the cutoff {cutoff}; it must be at least 1")
    if type(metric.aggregator()).__name__ != "MeanAgg":
        raise InputError(
            f"{name!r} counts over all queries; a metric that is averaged over them is expected"
        )
    return metric


def _options(text: str) -> dict[str, Any]:
    """Read ``rel=2, judged_only=True``: names and literals, nothing that is executed."""
    call = ast.parse(f"f({text})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args or not all(k.arg for k in call.keywords):
        raise ValueError("options are written name=value")
    return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}


def _suggestion(name: str, registry: dict[str, Any]) -> str:
    first: dict[Any, str] = {}
    # Aliases (MAP, α_nDCG) lead to the name that ir-measures itself prints.
    plain = {known.lower(): first.setdefault(kind, known) for known, kind in registry.items()}
    if name.lower() in plain:
        return f"did you mean {plain[name.lower()]}?"
    close = difflib.get_close_matches(name.lower(), plain, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(dict.fromkeys(plain[c] for c in close))}?"
    return f"known are {', '.join(first.values())}"


def _usage(name: str, kind: Any) -> str:
    options = [
        f"{option} (required)" if spec.required else option
        for option, spec in kind.SUPPORTED_PARAMS.items()
    ]
    return (
        f"{name} takes {', '.join(options) or 'no options'}, "
        f"written {name}(option=value)@{kind.AT_PARAM}"
    )


def _plain(error: Exception) -> str:
    # ir-measures shows its marker of an absent option as a bare object.
    return re.sub(r"=<object object at \w+>", " is missing", str(error)).replace(
        "invalid param cutoff is missing", "the cutoff is missing"
    )
