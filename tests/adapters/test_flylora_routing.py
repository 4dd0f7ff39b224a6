"""FlyLoRA's projection, choice and balance: official numbers, gradients, counts, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fullrank.adapters.flylora_routing import (
    count,
    flylora_output,
    rebalance,
    route,
    route_groups,
    sparse_projection,
)
from fullrank.core.errors import InputError

FOLDER = Path(__file__).parents[1] / "reference" / "flylora"
FORK = sorted(path.stem for path in FOLDER.glob("*_fork.npz"))
PLAIN = sorted({path.stem for path in FOLDER.glob("*.npz")} - set(FORK))


def load(name):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {k: torch.tensor(arrays[k]) for k in arrays.files}


def alone(x, A, B, d, k, scale, score="abs"):
    """The adapter on a layer that puts out zeros."""
    h = torch.zeros(*x.shape[:-1], len(B), dtype=x.dtype)
    return flylora_output(h, x, A, B, d, [(len(A), k)], scale, score)


def inputs(v):
    x, B = v["in_x"].requires_grad_(), v["in_B"].requires_grad_()
    # d asks for a gradient, and must not get one.
    d = v["in_d"].requires_grad_()
    return x, v["in_A"], B, d, int(v["meta_k"]), float(v["meta_alpha"]) / int(v["meta_r"])


@pytest.mark.parametrize("name", PLAIN)
def test_the_official_numbers(name):
    v = load(name)
    x, A, B, d, k, scale = inputs(v)
    y, taken = alone(x, A, B, d, k, scale)
    (y * v["in_dY"]).sum().backward()
    exactly = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y.detach(), v["official_y"], **exactly)
    assert torch.equal(taken, v["official_mask"].bool())
    assert torch.equal(count(taken), v["official_count"].float())
    torch.testing.assert_close(B.grad, v["official_grad_B"], **exactly)
    torch.testing.assert_close(x.grad, v["official_grad_x"], **exactly)
    assert d.grad is None
    following = rebalance(d.detach(), count(taken), float(v["meta_u"]))
    torch.testing.assert_close(following, v["derived_d_after_mean_count_rule"], **exactly)
    signed = route(v["official_proj"], d.detach(), k, "signed")
    assert torch.equal(signed, v["derived_mask_signed"].bool())


@pytest.mark.parametrize("name", FORK)
def test_the_fork_with_a_signed_score(name):
    v = load(name)
    x, A, B, d, k, scale = inputs(v)
    y, taken = alone(x, A, B, d, k, scale, "signed")
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close((y + x @ v["in_W0"].T).detach(), v["fork_y"], **near)
    (y * v["in_dY"]).sum().backward()
    torch.testing.assert_close(B.grad, v["fork_grad_B"], **near)
    following = rebalance(d.detach(), count(taken), float(v["meta_u"]))
    torch.testing.assert_close(following, v["fork_d_after_train_forward"], **near)
    # Its gradient lacks the adapter's own path; ours has that, and the base's beside it.
    taken_up = scale * ((v["in_dY"] @ v["in_B"].detach()) * taken) @ A
    torch.testing.assert_close(x.grad, taken_up, **near)
    torch.testing.assert_close(v["in_dY"] @ v["in_W0"], v["fork_grad_x"], **near)


@pytest.mark.parametrize(
    ("n", "density", "per_row"), [(20, 2 / 9, 4), (100, 0.29, 29), (3, 0.1, 1)]
)
def test_each_row_has_the_same_number_of_entries(n, density, per_row):
    A = sparse_projection(9, n, density, seed=3)
    assert ((A != 0).sum(1) == per_row).all()
    assert torch.equal(A, sparse_projection(9, n, density, seed=3))
    assert not torch.equal(A, sparse_projection(9, n, density, seed=4))


def test_entries_have_the_deviation_one_over_r_at_uniform_places():
    A = sparse_projection(64, 1024, 0.25)
    assert float(A[A != 0].std() * 64) == pytest.approx(1, abs=0.05)
    columns = (A != 0).float().mean(0)
    assert float(columns.mean()) == 0.25
    # Binomial: 64 rows that each hold a column with probability 1/4.
    assert float(columns.std()) == pytest.approx((0.25 * 0.75 / 64) ** 0.5, rel=0.1)


def test_distances_are_kept_on_average():
    n, r, k = 256, 32, 8
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    sizes = [(sparse_projection(r, n, k / r, seed) @ x).square().sum() for seed in range(300)]
    expected = float(x.square().sum()) * (n * k // r) / (n * r)
    assert float(torch.stack(sizes).mean()) == pytest.approx(expected, rel=0.06)


def test_projections_of_two_tasks_are_nearly_orthogonal():
    n, r, per_row = 256, 16, 64
    products = torch.stack(
        [
            sparse_projection(r, n, 0.25, 2 * i) @ sparse_projection(r, n, 0.25, 2 * i + 1).T
            for i in range(60)
        ]
    )
    expected = per_row**2 / (n * r**4)
    assert float(products.square().mean()) == pytest.approx(expected, rel=0.05)
    assert abs(float(products.mean())) < 4 * (expected / products.numel()) ** 0.5
    assert expected**0.5 < 0.2 * per_row / r**2


def test_the_rule_evens_out_the_use_of_experts():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2000, 8, generator=generator) * torch.linspace(0.5, 1.5, 8)
    d = torch.zeros(8)

    def spread(d):
        counts = count(route(y, d, 2))
        return float(counts.std() / counts.mean())

    before = spread(d)
    for _ in range(200):
        d = rebalance(d, count(route(y, d, 2)), 1e-2)
    assert spread(d) < 0.5 * before
    # A constant step for all, which is what comparing counts with a fraction comes to, shifts d
    # as a whole and leaves a signed choice where it was.
    signed = count(route(y, torch.zeros(8), 2, "signed"))
    assert torch.equal(count(route(y, torch.full((8,), -2.0), 2, "signed")), signed)


def test_all_experts_make_an_ordinary_low_rank_update():
    generator = torch.Generator().manual_seed(0)
    x, B = torch.randn(4, 10, generator=generator), torch.randn(6, 3, generator=generator)
    A = sparse_projection(3, 10, 1.0)
    y, taken = alone(x, A, B, torch.ones(3), 3, 2.0)
    assert taken.all()
    torch.testing.assert_close(y, 2.0 * x @ (B @ A).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_experts_of_float32(dtype):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    A, B, d = sparse_projection(32, 64, 0.25), torch.ones(7, 32), torch.zeros(32)
    y, taken = alone(x, A, B, d, 8, 1.0)
    wide, same = alone(x.float(), A, B, d, 8, 1.0)
    assert y.dtype == dtype
    assert torch.equal(taken, same)
    with torch.autocast("cpu", torch.bfloat16):
        y, taken = alone(x.float(), A, B, d, 8, 1.0)
    assert torch.equal(taken, same)
    torch.testing.assert_close(y.float(), wide, rtol=2e-2, atol=2e-2)


def test_shapes_strides_padding_and_a_single_sample():
    A, B, d = sparse_projection(6, 10, 0.3), torch.ones(4, 6), torch.zeros(6)
    x = torch.randn(3, 10, 2, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    y, taken = alone(x, A, B, d, 2, 1.0)
    assert y.shape == (3, 2, 4)
    torch.testing.assert_close(y, alone(x.contiguous(), A, B, d, 2, 1.0)[0])
    assert alone(x[0, 0], A, B, d, 2, 1.0)[0].shape == (4,)
    tokens = torch.tensor([[1, 1], [1, 0], [0, 0]])
    assert torch.equal(count(taken, tokens), count(taken[:2].flatten(0, 1)[:3]))
    assert float(count(taken[0, 0]).sum()) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparse_projection(0, 4, 0.5), "at least 1"),
        (lambda: sparse_projection(4, 4, 0.0), "density=0.0"),
        (lambda: sparse_projection(4, 4, 1.5), "density=1.5"),
        (lambda: route(torch.ones(3), torch.zeros(3), 4), "k=4"),
        (lambda: route(torch.ones(3), torch.zeros(3), 0), "k=0"),
        (lambda: route(torch.ones(3), torch.zeros(3), 1, "none"), "score='none'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_groups_choose_and_balance_among_their_own():
    y = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    groups, d = [(4, 1), (3, 2)], torch.linspace(-1, 1, 7)
    taken = route_groups(y, d, groups)
    assert torch.equal(taken[:, :4], route(y[:, :4], d[:4], 1))
    assert torch.equal(taken[:, 4:], route(y[:, 4:], d[4:], 2))
    counts = count(taken)
    following = rebalance(d, counts, 0.1, groups)
    assert torch.equal(following[:4], rebalance(d[:4], counts[:4], 0.1))
    assert torch.equal(following[4:], rebalance(d[4:], counts[4:], 0.1))
    with pytest.raises(InputError, match="groups of"):
        route_groups(y, d, [(4, 1)])
