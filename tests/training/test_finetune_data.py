"""Rows to fine-tune on: what is held out of a file, and what is refused."""

import json
import random

import pytest

from fullrank.core.errors import InputError
from fullrank.training.finetune_data import has_fields, read_rows


def test_no_label_is_held_out_altogether(tmp_path):
    labels = [f"rare{i}" for i in range(0, 40, 2)] + ["common"] * 20
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"t": str(i), "l": label}) + "\n" for i, label in enumerate(labels))
    )
    for seed in range(5):
        rows = read_rows(path, ("t", "l"), seed)
        assert (len(rows.train), {label for _, label in rows.dev}) == (36, {"common"})
        assert rows == read_rows(path, ("t", "l"), seed)
    path.write_text("".join(json.dumps({"t": str(i), "l": i}) + "\n" for i in range(20)))
    with pytest.raises(InputError, match="one line of each label"):
        read_rows(path, ("t", "l"), 0)
    # Draws without such a label are as they always were.
    path.write_text("".join(json.dumps({"t": str(i), "l": i % 2}) + "\n" for i in range(20)))
    drawn = random.Random(3).sample(range(20), 2)
    assert {int(text) for text, _ in read_rows(path, ("t", "l"), 3).dev} == set(drawn)


def test_half_a_surrogate_pair_is_told(tmp_path):
    path = tmp_path / "rows.JSONL"
    path.write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "\\ud83d", "completion": "b"}\n'
    )
    with pytest.raises(InputError, match="line 2: the field 'prompt' holds half of a surrogate"):
        read_rows(path, ("prompt", "completion"))
    assert has_fields(path, ("prompt", "completion"))
