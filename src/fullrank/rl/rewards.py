"""Rewards that can be checked: a number that is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

_MARKED = re.compile(r"####\s*(-?[\d,]*\.?\d+)")
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*|-?\.\d+")


def final_number(text: str) -> Decimal | None:
    r"""Return the number behind ``####`` (GSM8K's mark), or else the last one in a text.

    >>> final_number("2 + 2 is 4, so\n#### 1,004"), final_number("it is 3.50."), final_number("no")
    (Decimal('1004'), Decimal('3.50'), None)
    """
    marked = _MARKED.findall(text)
    found = marked or _NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", "").rstrip("."))
    except InvalidOperation:
        return None


def arithmetic_reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Reward function for TRL: 1 where a completion ends in the right number, else 0.

    Parameters
    ----------
    completions
        Texts, or conversations whose last message counts.
    answer
        Column of the data set: the right answer of each, as a text that holds it.

    Examples
    --------
    >>> arithmetic_reward(["7 + 5 = 12", "#### 13"], answer=["12", "#### 12"])
    [1.0, 0.0]
    """
    return [
        float((found := final_number(_text(c))) is not None and found == final_number(str(a)))
        for c, a in zip(completions, answer, strict=True)
    ]


def _text(completion: Any) -> str:
    """Of a conversation the last message; nothing where there is none, or it has no text."""
    if isinstance(completion, str):
        return completion
    return str((completion[-1] if completion else {}).get("content") or "")
