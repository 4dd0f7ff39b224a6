"""Every subspace: down and up are adjoint, up after down projects, rotation keeps images."""

import pytest
import torch

from fullrank.core.errors import InputError
from fullrank.optim import (
    Coordinates,
    Identity,
    IterativeSubspace,
    Nothing,
    RandomSubspace,
    Subspace,
    SVDSubspace,
)
from fullrank.optim.seeds import generator_for, mixed, seed_of

SHAPES = [(12, 20), (20, 12), (9, 9), (7, 1), (1, 7)]


def spaces(shape):
    m, n = shape
    r = min(m, n, 3)
    found = {}
    for kind in (SVDSubspace, IterativeSubspace, RandomSubspace):
        for side in ("left", "right", "full"):
            found[f"{kind.__name__}-{side}"] = kind(r, side)
    for side, most in (("columns", n), ("rows", m), ("randk", m * n)):
        found[side] = Coordinates(max(1, most // 3), side, shape)
    return found


NAMES = list(spaces((5, 5)))


def fitted(space, G, seed=0):
    return space.fit(torch.zeros_like(G), G, generator_for(seed) if space.draws else None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_algebra(shape, name):
    G, H = torch.randn(2, *shape, dtype=torch.float64)
    space = fitted(spaces(shape)[name], G)
    assert isinstance(space, Subspace)
    R = space.down(H)
    assert R.shape == space.small_shape(shape)
    X = torch.randn(R.shape, dtype=torch.float64)
    torch.testing.assert_close((R * X).sum(), (H * space.up(X)).sum())
    torch.testing.assert_close(space.down(space.up(X)), X)
    rest = space.residual(H, R, torch.empty_like(H))
    torch.testing.assert_close(rest + space.up(R), H)
    torch.testing.assert_close(space.down(rest), torch.zeros_like(R), rtol=0, atol=1e-12)
    out = H.clone()
    space.up(X, out=out, alpha=-0.5, beta=2.0)
    torch.testing.assert_close(out, 2.0 * H - 0.5 * space.up(X))
    into = torch.empty(R.shape, dtype=torch.float64)
    assert space.down(H, out=into).data_ptr() == into.data_ptr()
    torch.testing.assert_close(into, R)


@pytest.mark.parametrize("name", NAMES)
def test_state_restores_the_same(name):
    shape = (12, 20)
    G = torch.randn(shape)
    blank = spaces(shape)[name]
    space = fitted(blank, G)
    spec = space.expected(shape, G.dtype)
    assert {k: (tuple(v.shape), v.dtype) for k, v in space.state.items()} == spec
    again = blank.restore({k: v.clone() for k, v in space.state.items()})
    assert again.fitted
    assert torch.equal(again.down(G), space.down(G))
    empty = blank.restore({k: torch.zeros(s, dtype=d) for k, (s, d) in spec.items()})
    assert not empty.fitted


@pytest.mark.parametrize("policy", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("name", NAMES)
def test_transport(name, policy):
    shape = (12, 20)
    G, H = torch.randn(2, *shape, dtype=torch.float64)
    old = fitted(spaces(shape)[name], G, 1)
    new = fitted(old, H, 2)
    M = torch.randn(old.small_shape(shape), dtype=torch.float64)
    moved = M.clone()
    new.transport(old, [moved], policy)
    expected = {"keep": M, "reset": 0 * M, "rotate": new.down(old.up(M))}[policy]
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.parametrize("name", NAMES)
def test_layout_does_not_matter(name, layout):
    H = torch.randn(12, 20, dtype=torch.float64)
    odd = H.t().contiguous().t() if layout == "transposed" else torch.stack([H, H], 2)[:, :, 0]
    space = fitted(spaces((12, 20))[name], H)
    torch.testing.assert_close(space.down(odd), space.down(H))
    X = torch.randn(space.small_shape((12, 20)), dtype=torch.float64)
    torch.testing.assert_close(space.up(X, out=odd, beta=1.0), H + space.up(X))


def test_random_bases_are_uniform_in_sign():
    signs = [
        RandomSubspace(1, "left").fit(torch.zeros(4, 2), torch.zeros(4, 2), generator_for(i)).left
        for i in range(200)
    ]
    positive = torch.stack([(s > 0).float() for s in signs]).mean(0)
    assert bool(((positive > 0.35) & (positive < 0.65)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_keep_the_dtype(dtype):
    G = torch.randn(12, 20).to(dtype)
    for name in ("SVDSubspace-left", "RandomSubspace-full"):
        space = fitted(spaces((12, 20))[name], G)
        assert all(basis.dtype == dtype for basis in space.state.values())
        assert space.down(G).dtype == dtype


def test_the_two_that_need_no_choice():
    G = torch.randn(3, 4)
    assert Identity().down(G) is G
    assert not Identity().residual(G, G, torch.empty(3, 4)).any()
    assert Nothing().down(G).numel() == 0
    assert torch.equal(Nothing().residual(G, torch.empty(0), torch.empty(3, 4)), G)
    out = G.clone()
    assert torch.equal(Nothing().up(torch.empty(0), out=out, beta=2.0), 2 * G)
    for space in (Identity(), Nothing()):
        with pytest.raises(InputError, match="not projected"):
            space.inject([G], G)


def test_before_a_choice():
    G = torch.randn(6, 8)
    space = Coordinates(2, "columns", (6, 8))
    assert not space.down(G).any()
    with pytest.raises(InputError, match="no basis yet"):
        SVDSubspace(2, "left").down(G)


@pytest.mark.parametrize("count", [0, 9])
def test_bad_counts_raise(count):
    with pytest.raises(InputError, match=f"{count} of 8 columns"):
        Coordinates(count, "columns", (6, 8))


def test_seeds():
    assert seed_of(None) == 0
    assert seed_of(torch.Generator().manual_seed(3)) == seed_of(torch.Generator().manual_seed(3))
    values = {mixed(a, b) for a in range(20) for b in range(20)}
    assert len(values) == 400
    assert all(0 <= value < 2**63 for value in values)
    for bad in (1.5, True, "x"):
        with pytest.raises(InputError, match="generator="):
            seed_of(bad)


def test_iteration_from_all_directions_of_a_side_sees_new_ones():
    torch.manual_seed(0)
    first, second = torch.zeros(2, 4, 9)
    first[:, :4], second[:, 5:] = torch.randn(2, 4, 4)
    space = IterativeSubspace(4, "right").fit(first, first)
    again = space.fit(second, second)
    kept = again.down(second).square().sum() / second.square().sum()
    assert kept > 1 - 1e-5
