"""Instruction data as token ids: which tokens are read, and which are scored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullrank.core.errors import InputError

_RESPONSES = ("response", "output", "completion", "answer")
_PROMPTS = ("instruction", "prompt", "question")
# What else a row may say of its quality: name here -> names in data.
_GIVEN = {"reward": ("reward",), "difficulty": ("difficulty", "diff"), "tags": ("instag",)}


@dataclass(frozen=True)
class Example:
    """A prompt and a response to it.

    Attributes
    ----------
    id
        Tells it from all others.
    prompt, response
        Texts.
    given
        Scores that came with it: reward, difficulty, number of tags.
    """

    id: str
    prompt: str
    response: str
    given: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tokens:
    """An example as the model reads it.

    Attributes
    ----------
    ids
        Of prompt and response.
    start
        Where the response begins.
    """

    ids: list[int]
    start: int


def read_examples(path: str | Path) -> list[Example]:
    """Read a JSON list or JSON lines of prompts and responses.

    A row has ``instruction`` (or ``prompt``, ``question``), maybe ``input``, and ``response`` (or
    ``output``, ``completion``, ``answer``), texts or numbers; maybe ``id``, ``reward``,
    ``difficulty``.

    Raises
    ------
    InputError
        When there is no such file, it is no UTF-8 or holds no rows, or a row lacks a field.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not in UTF-8 ({error}); convert it") from error
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except ValueError as error:
        raise InputError(f"{path} is neither a JSON list nor JSON lines: {error}") from error
    return examples_of(rows, str(path))


def _lines(text: str) -> list[Any]:
    # Not splitlines(): a text may hold Unicode's line separators as they are.
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def examples_of(rows: Iterable[Mapping[str, Any] | Example], where: str = "data") -> list[Example]:
    """Turn rows into examples, numbered where they have no id of their own.

    >>> (one,) = examples_of([{"instruction": "Add 2 and 3.", "output": "5", "diff": 1}])
    >>> one.id, one.prompt, one.response, one.given
    ('0', 'Add 2 and 3.', '5', {'difficulty': 1.0})
    """
    found = [
        row if isinstance(row, Example) else _example(row, number, where)
        for number, row in enumerate(rows)
    ]
    if not found:
        raise InputError(f"{where} holds no example")
    twice = [id_ for id_, times in Counter(e.id for e in found).items() if times > 1]
    if twice:
        raise InputError(
            f"{where}: two examples have the id {twice[0]!r} (rows without one are numbered from 0)"
        )
    return found


def _example(row: Any, number: int, where: str) -> Example:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}, row {number}: a table of fields is expected")
    prompt, response = (
        _text(row, names, f"{where}, row {number}") for names in (_PROMPTS, _RESPONSES)
    )
    if prompt is None or response is None:
        raise InputError(
            f"{where}, row {number}: there is no {' or '.join(_PROMPTS)} with a "
            f"{' or '.join(_RESPONSES)}; it has {', '.join(map(str, row)) or 'nothing'}"
        )
    if more := _text(row, ("input",), f"{where}, row {number}"):
        prompt = f"{prompt}\n{more}"
    given = {name: _number(_first(row, names)) for name, names in _GIVEN.items()}
    return Example(
        str(number if row.get("id") is None else row["id"]),
        prompt,
        response,
        {name: value for name, value in given.items() if value is not None},
    )


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _text(row: Mapping[str, Any], names: Sequence[str], where: str) -> str | None:
    value = _first(row, names)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise InputError(
        f"{where}: a text is expected for {' or '.join(names)}, not a {type(value).__name__}; of a "
        "conversation give the question and the answer as texts"
    )


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number else None


def tokens_of(
    tokenizer: Any,
    example: Example,
    *,
    max_length: int,
    response_tokens: int | None = None,
    template: str | None = None,
) -> Tokens | str:
    """Tokenise an example; returns why it is left out where nothing would be scored.

    Prompt and response are tokenised apart, so that no token spans the boundary (the official
    code counts tokens of the text before the response, which may be off by one).

    Parameters
    ----------
    tokenizer
        Of the model.
    example
        With its texts.
    max_length
        Tokens at most; the response is cut.
    response_tokens
        So many tokens of the response exactly: longer ones are cut, shorter ones left out.
    template
        ``"chat"`` for the tokenizer's chat template; None for prompt, newline, response.
    """
    if not example.response.strip():
        return "the response is empty"
    if template == "chat":
        prompt = _chat_prompt(tokenizer, example.prompt)
    else:
        prompt = tokenizer(example.prompt + "\n")["input_ids"]
        # A tokenizer may close a text; the response is to follow.
        if prompt and prompt[-1] == tokenizer.eos_token_id:
            prompt = prompt[:-1]
    response = tokenizer(example.response, add_special_tokens=False)["input_ids"]
    if response_tokens is not None and len(response) < response_tokens:
        return f"the response is shorter than {response_tokens} tokens"
    response = response[:response_tokens]
    if response_tokens is not None and len(prompt) + response_tokens > max_length:
        return f"prompt and {response_tokens} tokens are longer than {max_length}"
    ids = [*prompt, *response][:max_length]
    if len(ids) <= max(len(prompt), 1):
        return f"the prompt alone is longer than {max_length} tokens"
    return Tokens(ids, len(prompt))


def _chat_prompt(tokenizer: Any, prompt: str) -> list[int]:
    message = [{"role": "user", "content": prompt}]
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except ValueError as error:
        raise InputError(
            "the tokenizer has no chat template; give one, or read the texts as they are"
        ) from error
    return ids


def padded(batch: Sequence[Tokens], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and mask ``(B, T)``, filled up on the right."""
    longest = max(len(tokens.ids) for tokens in batch)
    ids = torch.full((len(batch), longest), pad)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, tokens in enumerate(batch):
        end = len(tokens.ids)
        ids[row, :end] = torch.tensor(tokens.ids)
        labels[row, tokens.start : end] = ids[row, tokens.start : end]
        mask[row, :end] = 1
    return ids, labels, mask
