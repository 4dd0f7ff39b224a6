"""RandLoRA's product: PEFT's and the official numbers, every way of computing, full rank."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from fullrank.adapters.randlora_bases import Recipe, bases_needed, standardised
from fullrank.adapters.randlora_layer import scale_of
from fullrank.adapters.randlora_product import _Linear, by_weight, delta, linear, update_of

FOLDER = Path(__file__).parents[1] / "reference" / "randlora"
CASES = []
for path in sorted(FOLDER.glob("*.npz")):
    with np.load(path) as arrays:
        CASES += [(path.stem, i) for i in range(len(arrays["meta_shapes"]))]
NEAR = {"rtol": 2e-5, "atol": 2e-5}


def load(name):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {k: torch.tensor(a) for k, a in arrays.items() if a.dtype.kind in "fi"}


def case(name, i, source="peft", pairing="upstream"):
    v = load(name)
    lam, gam = (v[f"in_{n}_{i}"].requires_grad_() for n in ("lambda", "gamma"))
    shape = tuple(v["meta_shapes"][i].tolist())
    A, B, scale = v[f"{source}_basis_A"], v[f"{source}_basis_B"], v[f"{source}_scaling_{i}"].item()
    return v, update_of(A, B, lam, gam, scale, shape, pairing)


def apply(x, u, weight=None, bias=None, *, through_weight, rebuild=False):
    """The function with its way chosen."""
    how = (u.scale, u.tall, u.pairing, through_weight, rebuild)
    return _Linear.apply(x, weight, bias, u.lam, u.gam, u.A, u.B, how)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_the_update_of_each_pairing(name, i):
    v, u = case(name, i)
    torch.testing.assert_close(delta(u).detach(), v[f"peft_delta_{i}"], **NEAR)
    torch.testing.assert_close(delta(u).detach().double(), v[f"derived_delta_{i}"], **NEAR)
    paper = v[f"derived_delta_paper_pairing_{i}"]
    found = delta(u._replace(pairing="paper")).detach().double()
    torch.testing.assert_close(found, paper, **NEAR)
    assert int(torch.linalg.matrix_rank(delta(u).detach())) == int(v[f"peft_rank_{i}"])


@pytest.mark.parametrize(("name", "i"), [c for c in CASES if c[0] != "tall_r5"])
def test_the_official_output(name, i):
    v, u = case(name, i, "official")
    torch.testing.assert_close(delta(u).detach(), v[f"official_delta_{i}"], **NEAR)
    y = linear(v[f"in_x_{i}"], u, v[f"in_W0_{i}"], v[f"in_bias_{i}"])
    torch.testing.assert_close(y.detach(), v[f"official_y_{i}"], **NEAR)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_the_scaling(name, i):
    v = load(name)
    r, alpha, count = int(v["meta_r"]), float(v["meta_alpha"]), v[f"in_gamma_{i}"].shape[0]
    assert scale_of(alpha, "peft", r, count) == pytest.approx(v[f"peft_scaling_{i}"].item())
    if f"official_scaling_{i}" in v:
        official = v[f"official_scaling_{i}"].item()
        assert scale_of(alpha, "official", r, count) == pytest.approx(official)


@pytest.mark.parametrize(("way", "rebuild"), [*itertools.product(["thin", "D", "W + D"], [0, 1])])
@pytest.mark.parametrize(("name", "i"), CASES)
def test_output_and_gradients_whichever_way(name, i, way, rebuild):
    v, u = case(name, i)
    x = v[f"in_x_{i}"].requires_grad_()
    W, bias, dY = v[f"in_W0_{i}"], v[f"in_bias_{i}"], v[f"in_dY_{i}"]
    options = {"through_weight": way != "thin", "rebuild": bool(rebuild)}
    if way == "W + D":
        y = apply(x, u, W, bias, **options)
    else:
        y = apply(x, u, **options) + x @ W.T + bias
    (y * dY).sum().backward()
    torch.testing.assert_close(y.detach(), v[f"peft_y_{i}"], **NEAR)
    torch.testing.assert_close(u.lam.grad, v[f"peft_grad_lambda_{i}"], **NEAR)
    torch.testing.assert_close(u.gam.grad, v[f"peft_grad_gamma_{i}"], **NEAR)
    torch.testing.assert_close(x.grad, dY @ (W + v[f"peft_delta_{i}"]), **NEAR)


def some(shape, r, pairing="upstream", dtype=torch.float64, seed=0):
    """An update of random numbers in bases that are larger than the layer needs."""
    generator = torch.Generator().manual_seed(seed)
    recipe = Recipe.of([shape, (max(shape) + 3, min(shape) + 5)], r, key=seed)
    A, B = (standardised(codes).to(dtype) for codes in recipe.draw())
    count = bases_needed(min(shape), r)
    lam = torch.randn(r, count, generator=generator, dtype=dtype).requires_grad_()
    gam = torch.randn(count, min(shape), generator=generator, dtype=dtype).requires_grad_()
    return update_of(A, B, lam, gam, 0.3, shape, pairing)


@pytest.mark.parametrize("pairing", ["upstream", "paper"])
@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize(("shape", "r"), [((7, 4), 3), ((4, 9), 4), ((5, 5), 2), ((3, 1), 1)])
def test_gradients_are_those_of_the_dense_formula(shape, r, tokens, pairing):
    u = some(shape, r, pairing)
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[0], generator=generator, dtype=torch.float64, requires_grad=True)
    # Not contiguous, and of three dimensions.
    x = torch.randn(shape[1], 1, tokens, generator=generator, dtype=torch.float64).permute(2, 1, 0)
    x.requires_grad_()
    target = torch.randn(tokens, 1, shape[0], generator=generator, dtype=torch.float64)
    leaves = (x, W, bias, u.lam, u.gam)
    plain = x @ (W + delta(u)).T + bias
    expected = torch.autograd.grad((plain * target).sum(), leaves)
    for rebuild, weight in itertools.product((False, True), (False, True)):
        if weight:
            y = apply(x, u, W, bias, through_weight=True, rebuild=rebuild)
        else:
            y = apply(x, u, through_weight=False, rebuild=rebuild) + x @ W.T + bias
        torch.testing.assert_close(y, plain, rtol=1e-9, atol=1e-9)
        found = torch.autograd.grad((y * target).sum(), leaves)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_thin_products_for_few_tokens_and_the_weight_for_many():
    u = some((40, 20), 4, dtype=torch.float32)
    few, many = torch.zeros(1, 20), torch.zeros(400, 20)
    assert not by_weight(few, u, False, shared=True)
    assert by_weight(many, u, False, shared=True)
    with torch.no_grad():
        assert by_weight(many, u, False, shared=True)


def test_no_tokens_and_no_gradient_at_zero():
    u = some((6, 4), 2)
    y = linear(torch.zeros(0, 4, dtype=torch.float64), u)
    y.sum().backward()
    assert y.shape == (0, 6)
    assert not u.lam.grad.any()
    u = some((6, 4), 2)
    linear(torch.zeros(3, 4, dtype=torch.float64, requires_grad=True), u).sum().backward()
    assert not u.lam.grad.any()
    assert not u.gam.grad.any()


def test_a_second_derivative_is_refused_rather_than_wrong():
    u = some((6, 4), 2)
    x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x, u).square().sum(), u.lam, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_under_autocast_outputs_are_the_layers_type_and_gradients_float32():
    u = some((64, 32), 8, dtype=torch.float32)
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    W = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    plain = x @ (W + delta(u)).T
    expected = torch.autograd.grad(plain.square().mean(), (x, u.lam, u.gam))
    for options in ({"through_weight": True}, {"through_weight": False}):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if options["through_weight"]:
                y = apply(x, u, W, None, **options)
            else:
                y = apply(x, u, **options) + torch.nn.functional.linear(x, W)
        assert y.dtype == torch.bfloat16
        found = torch.autograd.grad(y.float().square().mean(), (x, u.lam, u.gam))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("shape", [(9, 30), (30, 9), (17, 17), (13, 12)])
@pytest.mark.parametrize("r", [1, 4, 9])
def test_dense_bases_give_full_rank(shape, r):
    found = delta(some(shape, r)).detach()
    assert int(torch.linalg.matrix_rank(found)) == min(shape)
