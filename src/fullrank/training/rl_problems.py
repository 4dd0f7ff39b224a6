"""Problems to train on from rewards, and the functions that judge the responses."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fullrank.core.errors import InputError
from fullrank.datasets.jsonl import read_objects
from fullrank.training.rl_config import ARITHMETIC, ProblemSection

Row = dict[str, Any]
RewardFunction = Callable[..., list[float]]

_LARGEST = 30  # of the numbers that are added


@dataclass(frozen=True)
class Problems:
    """Problems to train on and others to measure on.

    Attributes
    ----------
    train, dev
        Rows with ``prompt`` and whatever the reward functions take.
    """

    train: list[Row]
    dev: list[Row]


def read_problems(section: ProblemSection, seed: int) -> Problems:
    """Make the built-in problems, or read those of a file.

    Raises
    ------
    InputError
        When the file is absent or damaged, or too short.
    """
    if section.source == ARITHMETIC:
        rows = sums(section.problems + section.dev_problems, seed)
    else:
        rows = _read(Path(section.source))
    if len(rows) < section.dev_problems + 2:
        raise InputError(
            f"{section.source} holds {len(rows)} problems; with data.dev_problems="
            f"{section.dev_problems} to measure on at least {section.dev_problems + 2} are needed"
        )
    cut = len(rows) - section.dev_problems
    return Problems(rows[:cut][: section.problems], rows[cut:])


def sums(count: int, seed: int) -> list[Row]:
    """Different sums of three numbers below 30, with the working that solves them.

    >>> sums(1, seed=0)
    [{'prompt': '14+0+23=', 'answer': '37', 'solution': '14+0=14,14+23=37 #### 37'}]
    """
    if count > _LARGEST**3 // 2:
        raise InputError(f"there are no {count} built-in problems; at most {_LARGEST**3 // 2}")
    draw = random.Random(seed)
    rows = []
    for number in draw.sample(range(_LARGEST**3), count):
        a, b, c = number // _LARGEST**2, number // _LARGEST % _LARGEST, number % _LARGEST
        answer = str(a + b + c)
        solution = f"{a}+{b}={a + b},{a + b}+{c}={answer} #### {answer}"
        rows.append({"prompt": f"{a}+{b}+{c}=", "answer": answer, "solution": solution})
    return rows


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        raise InputError(f"there is no file {path}; expected JSONL with prompt, or 'arithmetic'")
    rows = []
    for number, row in read_objects(path):
        if "prompt" not in row:
            raise InputError(f"{path}, line {number}: expected an object with prompt")
        rows.append(row)
    return rows


def reward_functions(names: Sequence[str]) -> list[RewardFunction]:
    """Find the functions that names mean: ``"arithmetic"`` or ``"module:function"``.

    Raises
    ------
    InputError
        When a module or a function is not there, or it cannot be called.

    Examples
    --------
    >>> [f.__name__ for f in reward_functions(["arithmetic", "math:fsum"])]
    ['arithmetic_reward', 'fsum']
    """
    return [_reward_function(name) for name in names]


def _reward_function(name: str) -> RewardFunction:
    if name == ARITHMETIC:
        from fullrank.rl import arithmetic_reward

        return arithmetic_reward
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise InputError(f"the reward {name!r}; write module:function, or arithmetic")
    # As `python -m` does: a file beside the settings is found.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise InputError(f"the reward {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise InputError(f"the reward {name!r} is a {type(found).__name__}, not a function")
    function: RewardFunction = found
    return function
