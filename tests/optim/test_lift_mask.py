"""Principal masks: the budget, ties, shapes, blocks, and the subspace made of one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.core.errors import InputError
from fullrank.optim.mask import (
    PrincipalMask,
    leading_indices,
    principal_mask,
    principal_part,
)
from fullrank.optim.subspace import Subspace


def weight(m, n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype)


def low_rank(W, R):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :R] * S[:R]) @ Vh[:R]


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    rank=st.integers(1, 5),
    R=st.integers(1, 30),
    largest=st.booleans(),
)
def test_the_mask_has_exactly_the_extreme_entries_of_the_svd(m, n, rank, R, largest):
    W, R = weight(m, n, m * 31 + n), min(R, m, n)
    mask = principal_mask(W, rank, R, largest)
    k = min(rank * (m + n), m * n)
    assert mask.shape == W.shape
    assert mask.sum() == k
    score = low_rank(W, R).abs()
    torch.testing.assert_close(principal_part(W, R).abs(), score, rtol=1e-9, atol=1e-9)
    if k < m * n:
        inside, outside = score[mask], score[~mask]
        sign = 1 if largest else -1
        assert (sign * inside).min() >= (sign * outside).max() - 1e-9


def test_ties_go_to_the_lowest_flat_index():
    W = torch.ones(4, 5)
    assert principal_mask(W, 1, 1).flatten().tolist() == [True] * 9 + [False] * 11
    assert principal_mask(W, 1, 1, largest=False).flatten().tolist() == [True] * 9 + [False] * 11
    score = torch.tensor([2.0, 1.0, 2.0, 3.0, 2.0])
    assert leading_indices(score, 3).tolist() == [0, 2, 3]
    assert leading_indices(score, 2, largest=False).tolist() == [0, 1]


def test_a_zero_weight_has_a_mask_too():
    assert principal_mask(torch.zeros(6, 8), 1, 2).sum() == 14


def test_rank_deficient_weights_are_their_own_principal_part():
    W = weight(20, 3) @ weight(3, 15, seed=1)
    torch.testing.assert_close(principal_part(W, 7), W)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (31, 31)])
def test_dtypes_and_strides(shape):
    W = weight(*shape)
    expected = principal_mask(W, 2, 4)
    assert torch.equal(principal_mask(W.T.contiguous().T, 2, 4), expected)
    assert torch.equal(principal_mask(W.T, 2, 4).T, expected)
    for dtype in (torch.bfloat16, torch.float16):
        half = W.to(dtype)
        assert torch.equal(principal_mask(half, 2, 4), principal_mask(half.float(), 2, 4))


def test_the_sketch_finds_nearly_the_same_entries():
    U = torch.linalg.qr(weight(120, 60))[0]
    V = torch.linalg.qr(weight(80, 60, 1))[0]
    W = (U * 0.9 ** torch.arange(60.0)) @ V.T
    exact, sketch = (
        principal_mask(W, 4, 8, svd=svd, generator=0) for svd in ("full", "randomized")
    )
    assert sketch.sum() == exact.sum()
    assert (exact & sketch).sum() > 0.95 * exact.sum()
    again = principal_mask(W, 4, 8, svd="randomized", generator=0)
    assert torch.equal(again, sketch)


@pytest.mark.parametrize("block", [4, (2, 3)])
def test_blocks_are_whole_and_the_heaviest(block):
    W = weight(16, 24)
    height, width = (block, block) if isinstance(block, int) else block
    mask = principal_mask(W, 2, 3, block=block)
    tiles = mask.unfold(0, height, height).unfold(1, width, width).flatten(2)
    assert (tiles.all(2) | ~tiles.any(2)).all()
    assert tiles.all(2).sum() == 2 * (16 + 24) // (height * width)
    sums = low_rank(W, 3).abs().unfold(0, height, height).unfold(1, width, width).sum((2, 3))
    assert sums[tiles.all(2)].min() >= sums[~tiles.any(2)].max()


def test_blocks_at_the_edges_may_be_cut_off():
    mask = principal_mask(torch.ones(5, 7), 2, 1, block=4)
    assert mask.shape == (5, 7)
    assert mask[:4, :4].all()
    assert not mask[4, 4:].any()


@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        ((torch.zeros(5), 1, 1), {}, "needs a matrix"),
        ((torch.zeros(5, 4, 3), 1, 1), {}, "needs a matrix"),
        ((torch.zeros(5, 4), 0, 1), {}, "rank=0"),
        ((torch.zeros(5, 4), 1, -1), {}, "lra_rank=-1"),
        ((torch.zeros(5, 4), 1, 5), {}, "4 at most"),
        ((torch.zeros(5, 4), True, 1), {}, "rank=True"),
        ((torch.full((5, 4), float("nan")), 1, 1), {}, "NaN"),
        ((torch.zeros(5, 4, dtype=torch.int64), 1, 1), {}, "int64"),
        ((torch.zeros(5, 4), 1, 1), {"block": 0}, "block=0"),
        ((torch.zeros(5, 4), 1, 1), {"svd": "exact"}, "svd='exact'"),
    ],
)
def test_bad_input(args, options, says):
    with pytest.raises(InputError, match=says):
        principal_mask(*args, **options)


def test_the_subspace_gathers_and_scatters():
    W, G = weight(9, 7), weight(9, 7, 1)
    subspace = PrincipalMask(1, 2).fit(W, G)
    assert isinstance(subspace, Subspace)
    mask = principal_mask(W, 1, 2)
    assert subspace.state["indices"].dtype == torch.int32
    assert subspace.expected((9, 7), W.dtype) == {"indices": ((16,), torch.int32)}
    assert torch.equal(subspace.down(G), G[mask])
    assert torch.equal(subspace.down(G.T.contiguous().T), G[mask])
    for out in (G.clone(), G.T.contiguous().T.clone()):
        subspace.up(W[mask], out=out, alpha=2.0, beta=0.5)
        torch.testing.assert_close(out[mask], 0.5 * G[mask] + 2.0 * W[mask])
        assert torch.equal(out[~mask], G[~mask])
    outside = subspace.residual(G, 2.0 * W[mask], torch.empty_like(G))
    torch.testing.assert_close(outside[mask], G[mask] - 2.0 * W[mask])
    assert torch.equal(outside[~mask], G[~mask])
    assert torch.equal(subspace.inject([mask], W).indices, subspace.indices)
    with pytest.raises(InputError, match="budget is 16"):
        subspace.inject([~mask], W)
    with pytest.raises(InputError, match="out="):
        subspace.up(W[mask])
    twin = PrincipalMask(1, 2).restore(subspace.state)
    assert torch.equal(twin.down(G), subspace.down(G))


def test_moments_travel_with_their_entries():
    old = PrincipalMask(1, 1, indices=torch.tensor([1, 4, 6], dtype=torch.int32))
    new = PrincipalMask(1, 1, indices=torch.tensor([0, 4, 9], dtype=torch.int32))
    moment = torch.tensor([1.0, 2.0, 3.0])
    new.transport(old, [moment], "keep")
    assert moment.tolist() == [0.0, 2.0, 0.0]
    new.transport(old, [moment], "reset")
    assert not moment.any()


def test_noise_on_principal_entries_raises_the_spectral_norm_most():
    """The paper's reason for the choice, on Gaussian matrices: more than by magnitude."""
    for seed in range(3):
        W, noise = weight(256, 256, seed), weight(256, 256, seed + 50)
        k = 6 * 512
        by_size = torch.zeros(W.numel(), dtype=torch.bool)
        by_size[leading_indices(W.abs().flatten(), k)] = True
        norms = []
        for mask in (principal_mask(W, 6, 6), by_size.view(W.shape)):
            moved = noise * mask
            norms.append(torch.linalg.matrix_norm(W + moved * (k**0.5 / moved.norm()), 2))
        assert norms[0] > norms[1] + 0.3
