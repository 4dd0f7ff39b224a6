"""GaLore's bases: when they are chosen, signs, moments, cheaper ones, those of a hook."""

import math
from itertools import pairwise

import pytest
import torch
from stepping import parameter, random_grads, run

from fullrank.optim import GaLoreAdamW, IterativeSubspace, SVDSubspace


def test_refresh_happens_on_schedule():
    W = parameter(8, 12)
    optimizer = GaLoreAdamW([W], rank=2, update_proj_gap=3)
    bases = []
    for step in random_grads([W], 7):
        run(optimizer, [W], [step])
        bases.append(optimizer.state[W]["basis_left"].clone())
    changed = [not torch.equal(a, b) for a, b in pairwise(bases)]
    assert changed == [False, False, True, False, False, True]


def test_signs_are_aligned_with_the_old_basis():
    W = parameter(8, 12)
    optimizer = GaLoreAdamW([W], rank=4, update_proj_gap=1)
    old = None
    for step in random_grads([W], 6):
        run(optimizer, [W], [step])
        new = optimizer.state[W]["basis_left"].clone()
        if old is not None:
            assert bool(((new * old).sum(0) >= 0).all())
        old = new


@pytest.mark.parametrize("refresh", ["svd", "subspace"])
def test_zero_gradients_keep_the_old_basis(refresh):
    W = parameter(8, 12)
    zero = torch.zeros(8, 12)
    optimizer = GaLoreAdamW([W], rank=2, update_proj_gap=2, refresh=refresh)
    start = W.detach().clone()
    run(optimizer, [W], [[zero], [zero], [zero]])
    assert torch.equal(W, start)
    assert not optimizer.state[W]["basis_left"].any()
    (G,) = random_grads([W], 1)[0]
    # The first gradient that has a subspace gives it, whatever the schedule says.
    run(optimizer, [W], [[G]])
    basis = optimizer.state[W]["basis_left"].clone()
    torch.testing.assert_close(basis.T @ basis, torch.eye(2))
    run(optimizer, [W], [[zero]])
    assert torch.equal(optimizer.state[W]["basis_left"], basis)
    assert torch.isfinite(W).all()


def test_gradients_of_low_rank_are_fine():
    W = parameter(10, 12)
    grads = [[torch.outer(torch.randn(10), torch.randn(12))] for _ in range(6)]
    run(GaLoreAdamW([W], rank=5, update_proj_gap=2, refresh="subspace"), [W], grads)
    assert torch.isfinite(W).all()


def test_moments_reset_starts_over():
    grads = random_grads([torch.empty(8, 12)], 5)
    W, fresh = parameter(8, 12), parameter(8, 12)
    options = {"rank": 2, "update_proj_gap": 3, "moments": "reset"}
    optimizer = GaLoreAdamW([W], **options)
    run(optimizer, [W], grads[:3])
    fresh.data.copy_(W.data)
    other = GaLoreAdamW([fresh], **options)
    run(optimizer, [W], grads[3:])
    run(other, [fresh], grads[3:])
    # Bases agree up to signs, of which a moment that starts at 0 knows nothing.
    torch.testing.assert_close(W.data, fresh.data)
    assert optimizer.state[W]["unseen"] == 3


def test_moments_rotate_keeps_their_image():
    W = parameter(8, 12, dtype=torch.float64)
    G, H = random_grads([W], 2)
    optimizer = GaLoreAdamW([W], rank=7, update_proj_gap=1, moments="rotate", betas=(0.9, 0.999))
    run(optimizer, [W], [G])
    state = optimizer.state[W]
    before, mean = state["basis_left"].clone(), state["exp_avg"].clone()
    run(optimizer, [W], [H])
    new = state["basis_left"]
    expected = 0.9 * (new.T @ before @ mean) + 0.1 * (new.T @ H[0])
    torch.testing.assert_close(state["exp_avg"], expected)


def turning(steps, m, n, noise):
    """A gradient with a decaying spectrum whose singular vectors turn a little every step."""
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(s, k))[0] for s in (m, n))
    sigma = torch.arange(1, k + 1).float() ** -1.0
    for _ in range(steps):
        U = torch.linalg.qr(U + noise / math.sqrt(m) * torch.randn(m, k))[0]
        V = torch.linalg.qr(V + noise / math.sqrt(n) * torch.randn(n, k))[0]
        yield (U * sigma) @ V.T


@pytest.mark.parametrize("noise", [0.003, 0.03, 0.3, 1.0])
@pytest.mark.parametrize(
    ("shape", "side"),
    [((96, 64), "right"), ((64, 96), "left"), ((96, 64), "left"), ((64, 96), "full")],
)
def test_subspace_refresh_keeps_the_energy(shape, side, noise):
    subspace, iterated = IterativeSubspace(16, side), 0
    for G in turning(8, *shape, noise):
        subspace = subspace.fit(torch.empty(shape), G)
        best = SVDSubspace(16, side).fit(torch.empty(shape), G).down(G).square().sum()
        assert subspace.down(G).square().sum() >= 0.999 * best
        iterated += subspace.steps > 0
        for basis in subspace.state.values():
            short = basis if basis.shape[0] < basis.shape[1] else basis.T
            torch.testing.assert_close(short @ short.T, torch.eye(16), rtol=0, atol=1e-5)
    # Where the gradient turns slowly, all but the first fit are iterations.
    assert noise > 0.01 or iterated == 7


def test_a_hook_may_leave_the_choice():
    W, V = parameter(4, 6), parameter(4, 6)
    V.data.copy_(W.data)
    grads = random_grads([W], 3)
    run(GaLoreAdamW([W], rank=2, projection_hook=lambda w, g, side: None), [W], grads)
    run(GaLoreAdamW([V], rank=2), [V], grads)
    assert torch.equal(W, V)
