"""Rows to fine-tune on: prompts with completions, texts with labels, judged queries."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.core.errors import InputError
from fullrank.datasets.jsonl import read_objects
from fullrank.datasets.texts import checked_text

if TYPE_CHECKING:
    from fullrank.datasets import Dataset

# Share of the rows that is held out of a file that comes without parts.
_HELD_OUT = 0.1
_PARTS = {"train": ("train",), "dev": ("dev", "valid", "validation")}


@dataclass(frozen=True)
class Rows:
    """Rows of two fields in two parts.

    Attributes
    ----------
    name
        What the data is called.
    train, dev
        ``(first field, second field)`` of each row.
    """

    name: str
    train: tuple[tuple[str, str], ...]
    dev: tuple[tuple[str, str], ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both parts."""
        return hashlib.sha256(json.dumps([self.train, self.dev]).encode()).hexdigest()


def read_rows(source: str | Path, fields: tuple[str, str], seed: int | None = None) -> Rows:
    r"""Read two fields of each line of a JSONL file, or of ``train`` and ``dev`` in a folder.

    Parameters
    ----------
    source
        The file or folder.
    fields
        Their names.
    seed
        Of the tenth that is drawn from a file to measure on, where the second field is a label: of
        each one some row is left to train on. None takes the last lines.

    Raises
    ------
    InputError
        When there is no such file, a line lacks a field or holds what no tokenizer reads, or there
        are too few lines.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
    >>> _ = path.write_text("".join(json.dumps({"q": str(i), "a": "-"}) + "\n" for i in range(20)))
    >>> rows = read_rows(path, ("q", "a"))
    >>> len(rows.train), rows.dev
    (18, (('18', '-'), ('19', '-')))
    """
    path = Path(source)
    if path.is_dir():
        parts = {}
        for part, stems in _PARTS.items():
            files = [path / f"{stem}.jsonl" for stem in stems]
            found = next((file for file in files if file.is_file()), None)
            if found is None:
                raise InputError(f"{path} has no {part}.jsonl; give both parts, or one JSONL file")
            parts[part] = _fields(found, fields)
        return Rows(path.name, parts["train"], parts["dev"])
    if not path.is_file():
        raise InputError(f"no rows at {str(source)!r}; expected a JSONL file, or a folder of them")
    rows = _fields(path, fields)
    held = max(1, round(_HELD_OUT * len(rows)))
    if len(rows) <= held:
        raise InputError(f"{path} has {len(rows)} lines; some to train on and some to measure on")
    chosen = set(range(len(rows) - held, len(rows)))
    if seed is not None:
        chosen = _drawn([label for _, label in rows], held, seed)
        if not chosen:
            raise InputError(f"{path} has one line of each label; some more to measure on")
    return Rows(
        path.stem,
        tuple(row for i, row in enumerate(rows) if i not in chosen),
        tuple(row for i, row in enumerate(rows) if i in chosen),
    )


def _drawn(labels: Sequence[str], held: int, seed: int) -> set[int]:
    """Draw rows to hold out, but never all of a label."""
    generator = random.Random(seed)
    chosen = set(generator.sample(range(len(labels)), held))
    left = Counter(label for i, label in enumerate(labels) if i not in chosen)
    for i in sorted(chosen):
        if not left[labels[i]]:
            chosen.remove(i)
            left[labels[i]] += 1
    if len(chosen) < held:
        for i in generator.sample(range(len(labels)), len(labels)):
            if i not in chosen and len(chosen) < held and left[labels[i]] > 1:
                chosen.add(i)
                left[labels[i]] -= 1
    return chosen


def has_fields(source: str | Path, fields: Sequence[str]) -> bool:
    """Whether a source is JSONL whose first line has all these fields."""
    path = Path(source)
    path = path / "train.jsonl" if path.is_dir() else path
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return False
    first = next(iter(read_objects(path)), None)
    return first is not None and all(field in first[1] for field in fields)


def read_judged(source: str) -> Dataset:
    """Read a collection; a BEIR folder with judgements to train on brings its own parts."""
    from fullrank.datasets import read_dataset

    judged = {path.name.partition(".")[0] for path in Path(source).glob("qrels/*.tsv*")}
    if "train" not in judged:
        return read_dataset(source)
    train = read_dataset(source, split="train")
    if "dev" not in judged:
        return train
    dev = read_dataset(source, split="dev")
    return dataclasses.replace(
        train,
        queries={**train.queries, **dev.queries},
        qrels={**train.qrels, **dev.qrels},
        parts={
            "train": tuple(q for q in train.queries if q not in dev.queries),
            "dev": tuple(dev.queries),
        },
    )


def _fields(path: Path, fields: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    rows = []
    for number, record in read_objects(path):
        values: list[Any] = []
        for field in fields:
            if record.get(field) is None:
                raise InputError(
                    f"{path}, line {number}: no {field!r} among the keys {sorted(record)}; name "
                    "the right one in data:"
                )
            text = checked_text(str(record[field]), field, f"{path}, line {number}")
            values.append(text)
        rows.append((values[0], values[1]))
    if not rows:
        raise InputError(f"{path} is empty")
    return tuple(rows)
