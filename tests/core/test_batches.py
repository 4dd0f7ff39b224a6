"""How many samples a batch has, and its first ones."""

from typing import NamedTuple

import pytest
import torch

from fullrank.core.batches import first_rows, rows_in
from fullrank.core.errors import InputError


class Pair(NamedTuple):
    x: torch.Tensor
    scale: torch.Tensor


def test_samples_of_batches_of_any_form():
    x = torch.arange(12).view(4, 3)
    for batch in (x, (x, 1), [x], {"options": {"scale": 2}, "x": x}, Pair(x, torch.tensor(2.0))):
        assert rows_in(batch) == 4
    cut = first_rows(Pair(x, torch.tensor(2.0)), 3)
    assert isinstance(cut, Pair)
    assert torch.equal(cut.x, x[:3])
    assert cut.scale == 2
    nested = first_rows({"a": {"x": x, "name": "n"}, "other": torch.ones(2)}, 1)
    assert nested["a"]["x"].shape == (1, 3)
    assert nested["a"]["name"] == "n"
    assert len(nested["other"]) == 2
    batch = {"x": x}
    assert first_rows(batch, 9) is batch


@pytest.mark.parametrize("batch", [3, {}, {"x": torch.tensor(1.0)}, "text"])
def test_a_batch_without_samples(batch):
    with pytest.raises(InputError, match="no tensor of samples"):
        rows_in(batch)
