"""Rank dynamics along a response against the official code, and what they promise."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fullrank.core.errors import InputError
from fullrank.spectra import effective_rank, rank_dynamics

FILES = sorted((Path(__file__).parents[1] / "reference" / "verl").glob("*.npz"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-3)])
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_official_numbers(file, dtype, tolerance):
    case = np.load(file)
    hp = dict(zip(case["hp_names"].tolist(), case["hp"].tolist(), strict=True))
    for step, hidden in enumerate(case["hidden"]):
        found = rank_dynamics(
            torch.from_numpy(hidden).to(dtype),
            torch.from_numpy(case["mask"][step]),
            stride=int(hp["stride"]),
            max_tokens=int(hp["max_seq_len"]),
        )
        for name in ("er", "erv", "era"):
            expected = case[f"{name}_f64"][step]
            np.testing.assert_allclose(getattr(found, name), expected, rtol=0, atol=tolerance)


def draw(rows, length, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, width, generator=generator, dtype=torch.float64)


def by_definition(states, stride, most):
    """One response, prefix by prefix."""

    def rank(z):
        return effective_rank(z, center=True, eps=1e-8, eps_in="log") if len(z) > 1 else 0.0

    window = states[-most:]
    series = [rank(window[: t + 1]) for t in range(stride, len(window), stride)]
    change = [r - sum(series[:j]) / j for j, r in enumerate(series) if j]
    velocity = sum(change) / len(change) if change else 0.0
    steps = [b - a for a, b in pairwise(change)]
    return rank(states), velocity, sum(steps) / len(steps) if steps else 0.0


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(1, 45),
    st.integers(0, 100),
)
def test_any_lengths_match_the_definition(lengths, width, stride, most, seed):
    hidden = draw(len(lengths), 40, width, seed)
    # Real tokens stand anywhere in the row.
    mask = torch.zeros(len(lengths), 40, dtype=torch.bool)
    for row, length in enumerate(lengths):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed + row))
        mask[row, order[:length]] = True
    found = rank_dynamics(hidden, mask, stride, most)
    for row in range(len(lengths)):
        expected = by_definition(hidden[row, mask[row]], stride, most)
        got = [float(measure[row]) for measure in found]
        assert got == pytest.approx(expected, abs=2e-5)


HARD = {
    "a large common mean": lambda x: x + 1e6,
    "one feature far out": lambda x: torch.cat([1e4 * x[..., :1], x[..., 1:]], -1),
    "few states, repeated": lambda x: x[:, torch.arange(x.shape[1]) % 7],
    "one direction, and noise": lambda x: x[..., :1] * x[:, :1] + 1e-6 * x,
    "even": lambda x: x,
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("width", [24, 130])
def test_hard_spectra_in_float64(kind, width):
    hidden = HARD[kind](draw(2, 120, width))
    found = rank_dynamics(hidden, torch.arange(120) < torch.tensor([[120], [100]]), 10, 110)
    for row, length in enumerate((120, 100)):
        got = [float(measure[row]) for measure in found]
        assert got == pytest.approx(by_definition(hidden[row, :length], 10, 110), abs=1e-8)


def test_a_large_common_mean_in_float32():
    hidden = (draw(2, 120, 130) + 1e5).float()
    found = rank_dynamics(hidden, torch.arange(120) < torch.tensor([[120], [70]]), 10)
    for row, length in enumerate((120, 70)):
        got = [float(measure[row]) for measure in found]
        expected = by_definition(hidden[row, :length].double(), 10, 512)
        assert got == pytest.approx(expected, abs=2e-3)


def test_padding_never_counts_and_batches_do_not_matter():
    hidden = draw(3, 30, 8)
    mask = torch.arange(30) < torch.tensor([30, 17, 9])[:, None]
    noisy = hidden.clone()
    noisy[~mask] = float("nan")
    whole = rank_dynamics(noisy, mask, stride=4)
    for row in range(3):
        alone = rank_dynamics(hidden[row : row + 1, mask[row]], stride=4)
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[row], b[0])


def test_invariant_to_scale_and_rotation():
    hidden = draw(2, 50, 6)
    turn = torch.linalg.qr(draw(1, 6, 6, 1)[0]).Q
    first, second = rank_dynamics(hidden, stride=5), rank_dynamics(7 * hidden @ turn, stride=5)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_strides_dtypes_and_gradients():
    hidden = draw(2, 40, 12)
    expected = rank_dynamics(hidden[:, ::2, ::3].contiguous(), stride=4)
    for a, b in zip(rank_dynamics(hidden[:, ::2, ::3], stride=4), expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        rank_dynamics(H=hidden.numpy(), stride=4), rank_dynamics(hidden, stride=4), strict=True
    ):
        assert torch.equal(a, b)
    found = rank_dynamics(hidden.float().requires_grad_(), stride=4)
    assert not found.er.requires_grad
    assert found.er.dtype == torch.float64
    assert torch.isfinite(rank_dynamics(hidden.bfloat16(), stride=4).erv).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_constant_states_have_rank_one_as_the_definition_has_it(dtype):
    hidden = draw(1, 1, 80).to(dtype).expand(1, 70, 80)
    found = rank_dynamics(hidden, stride=5)
    assert [float(measure) for measure in found] == pytest.approx([1, 0, 0], abs=1e-8)
    assert effective_rank(torch.ones(30, 4), center=True, eps=1e-8, eps_in="log") == 1
    assert effective_rank(torch.ones(1, 4), center=True, eps=1e-8, eps_in="log") == 0
    assert effective_rank(torch.ones(30, 4), center=True, eps=1e-7) == 0


@pytest.mark.parametrize(
    ("hidden", "options", "message"),
    [
        (torch.ones(3, 4), {}, "expected floating"),
        (torch.ones(3, 4, 5, dtype=torch.int64), {}, "expected floating"),
        (torch.ones(3, 4, 5), {"stride": 0}, "stride"),
        (torch.ones(3, 4, 5), {"max_tokens": 0}, "max_tokens"),
        (torch.ones(3, 4, 5), {"mask": torch.ones(3, 5)}, "mask"),
        (torch.full((3, 4, 5), float("nan")), {}, "NaN"),
    ],
)
def test_bad_input(hidden, options, message):
    with pytest.raises(InputError, match=message):
        rank_dynamics(hidden, **options)
