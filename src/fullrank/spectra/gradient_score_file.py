"""Scores of examples on the disk, written batch by batch and gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fullrank.core.errors import InputError
from fullrank.core.files import atomic_write


class ScoreFile:
    """Scores as JSON lines: whose they are, then one line an example, batch by batch.

    Of a batch that was cut off nothing is kept: another batch would round in another way.
    """

    def __init__(self, path: Path, identity: dict[str, Any], batches: list[list[str]]) -> None:
        self.path = path
        self.rows: dict[str, Any] = {}
        kept = [json.dumps(identity)]
        if path.is_file():
            lines = path.read_text(encoding="utf-8").split("\n")
            if lines[0] != kept[0]:
                raise InputError(
                    f"{path} holds scores of another model, data or settings; give a new file"
                )
            whole = iter(lines[1:-1])  # what follows the last line break was cut off
            for batch in batches:
                part = [line for _, line in zip(batch, whole, strict=False)]
                if len(part) < len(batch):
                    break
                for line in part:
                    values = json.loads(line)
                    self.rows[values.pop("id")] = values
                kept += part
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, ("\n".join(kept) + "\n").encode())

    def append(self, rows: Mapping[str, Any]) -> None:
        """Write a batch's lines."""
        lines = "".join(json.dumps({"id": id_, **values}) + "\n" for id_, values in rows.items())
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)
