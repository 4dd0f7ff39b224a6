"""Effective ranks of all prefixes from determinants, against an SVD of each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.spectra import effective_rank, rank_dynamics
from fullrank.spectra.prefix_ranks import prefix_ranks

EPS = 1e-8


def walk(rows, length, width, seed=0):
    """States that remember: ranks grow along them as those of a language model do."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(rows, length, width, generator=generator, dtype=torch.float64)
    found = [steps[:, 0]]
    for t in range(1, length):
        found.append(0.9 * found[-1] + 0.44 * steps[:, t])
    return torch.stack(found, 1)


def by_svd(rows, sizes):
    return torch.tensor(
        [
            [effective_rank(sequence[:size], center=True, eps=EPS, eps_in="log") for size in wanted]
            for sequence, wanted in zip(rows, sizes.tolist(), strict=True)
        ],
        dtype=torch.float64,
    )


def scaled(width, lowest):
    return torch.logspace(0, lowest, width, dtype=torch.float64)


SPECTRA = {
    "flat": lambda x: torch.randn(
        x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype
    ),
    "remembering": lambda x: x,
    "falling": lambda x: x * scaled(x.shape[2], -2),
    "steep": lambda x: x * scaled(x.shape[2], -6),
    "one feature far out": lambda x: torch.cat([x[..., 1:], 1000 * x[..., :1] + 3000], -1),
    "rank 20": lambda x: x[..., :20] @ walk(1, 20, x.shape[2], 3)[0],
    "rank 20 and noise": lambda x: x[..., :20] @ walk(1, 20, x.shape[2], 3)[0] + 1e-3 * x,
    "rank 1": lambda x: x[..., :1] @ walk(1, 1, x.shape[2], 3)[0],
    "tiny": lambda x: 1e-30 * x,
    "huge": lambda x: 1e30 * x,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", SPECTRA)
def test_any_spectrum(kind, dtype):
    rows = SPECTRA[kind](walk(2, 200, 230)).to(dtype)
    sizes = torch.tensor([[129, 130, 141, 161, 200], [150, 181, 195, 199, 200]])
    expected = by_svd(rows.double(), sizes)
    if kind == "tiny":
        # All of it is below eps; what counts is that nothing breaks.
        assert torch.isfinite(prefix_ranks(rows, sizes, EPS)).all()
        return
    torch.testing.assert_close(prefix_ranks(rows, sizes, EPS), expected, rtol=6e-5, atol=0)


@settings(max_examples=20, deadline=None)
@given(
    length=st.integers(2, 60),
    more=st.integers(0, 20),
    scale=st.floats(1e-2, 1e6),
    seed=st.integers(0, 999),
)
def test_any_size(length, more, scale, seed):
    rows = scale * walk(1, length, length + more, seed)
    sizes = torch.arange(2, length + 1)[None]
    found = prefix_ranks(rows, sizes, EPS)
    torch.testing.assert_close(found, by_svd(rows, sizes), rtol=1e-4, atol=0)
    assert bool((found >= 1 - 1e-4).all())
    assert bool((found <= (sizes - 1) * (1 + 1e-4)).all())


def test_rows_that_are_alike():
    rows = walk(1, 150, 160)
    rows[:, :50] = rows[:, :1]
    found = prefix_ranks(rows, torch.tensor([[20, 50, 51, 150]]), EPS)[0]
    assert found[:2].tolist() == [1.0, 1.0]
    assert found[2].item() == pytest.approx(1, abs=1e-4)
    assert found[3].item() == pytest.approx(by_svd(rows, torch.tensor([[150]])).item(), rel=6e-5)
    assert prefix_ranks(torch.zeros(1, 9, 9), torch.tensor([[9]]), EPS).item() == 1.0


@pytest.mark.parametrize(
    ("width", "most", "lengths"),
    [
        (200, 512, [180, 131, 7]),  # all by determinants
        (150, 512, [180, 150, 1]),  # longer than they are wide, at the end
        (110, 512, [180, 120, 2]),  # not by determinants
        (200, 140, [180, 140, 20]),  # the rank of the whole sees more than the others
        (140, None, [180, 0, 139]),
    ],
)
def test_long_responses_match_short_ways(width, most, lengths):
    hidden = walk(3, 180, width, 5).float()
    mask = torch.arange(180) < torch.tensor(lengths)[:, None]
    found = rank_dynamics(hidden, mask, 20, most)
    hidden = hidden.double()
    for row, length in enumerate(lengths):
        rows = hidden[row, :length]
        whole = float(by_svd(rows[None], torch.tensor([[length]]))) if length > 1 else 0.0
        assert found.er[row].item() == pytest.approx(whole, rel=6e-5)
        window = rows[-most:] if most else rows
        series = [
            float(by_svd(window[None], torch.tensor([[end + 1]])))
            for end in range(20, len(window), 20)
        ]
        changes = [r - sum(series[:j]) / j for j, r in enumerate(series) if j]
        velocity = sum(changes) / len(changes) if changes else 0.0
        turns = (changes[-1] - changes[0]) / (len(changes) - 1) if len(changes) > 1 else 0.0
        assert found.erv[row].item() == pytest.approx(velocity, rel=1e-4, abs=1e-12)
        assert found.era[row].item() == pytest.approx(turns, rel=2e-3, abs=1e-3)


def test_padding_in_front_and_not_finite_changes_nothing():
    hidden = walk(2, 150, 160)
    mask = torch.arange(150) >= torch.tensor([10, 0])[:, None]
    noisy = torch.where(mask[..., None], hidden, float("nan"))
    found = rank_dynamics(noisy, mask, 30)
    alone = rank_dynamics(hidden[:1, 10:], stride=30)
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a[:1], b, rtol=1e-5, atol=1e-5)


def test_threads_do_not_matter_and_are_given_back():
    hidden = walk(5, 200, 230).float()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = rank_dynamics(hidden, stride=20)
        torch.set_num_threads(2)
        shared = rank_dynamics(hidden, stride=20)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for a, b in zip(alone, shared, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
