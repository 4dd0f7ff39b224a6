"""Hydra's branches: official numbers, the fold into one layer, recovery of targets, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from fullrank.adapters.hydra_branches import Branch, hydra_lora, hydra_output
from fullrank.core.errors import InputError

FOLDER = Path(__file__).parents[1] / "reference" / "hydra"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
EXACTLY = {"rtol": 1e-10, "atol": 1e-10}
# Official names of a branch's four arrays, with and without biases.
KEYS = {
    True: ("down_proj.weight", "up_proj.weight", "down_proj.bias", "up_proj.bias"),
    False: ("A", "B"),
}


def load(name):
    with np.load(FOLDER / f"{name}.npz") as arrays:
        v = {k: torch.tensor(arrays[k]) for k in arrays.files}
    keys = KEYS["in_par_A" not in v]
    sides = {
        side: {key: v[f"in_{side}_{key}"].requires_grad_() for key in keys}
        for side in ("par", "seq")
    }
    parallel, sequential = (Branch(*side.values()) for side in sides.values())
    return v, sides, parallel, sequential, float(v.get("meta_scale", 1.0))


@pytest.mark.parametrize("name", NAMES)
def test_the_official_numbers(name):
    v, sides, parallel, sequential, scale = load(name)
    x = v["in_x"].requires_grad_()
    h = F.linear(x, v["in_W0"], v["in_bias"])
    y = hydra_output(h, x, parallel, sequential, scale)
    torch.testing.assert_close(y.detach(), v["official_y"], **EXACTLY)
    # The one from the third code base is a forward pass alone.
    assert ("in_dY" in v) == (name != "elevater_wide")
    if "in_dY" not in v:
        return
    (y * v["in_dY"]).sum().backward()
    for side, tensors in sides.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor.grad, v[f"official_grad_{side}_{key}"], **EXACTLY)
    if "official_grad_x" in v:
        torch.testing.assert_close(x.grad, v["official_grad_x"], **EXACTLY)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_merged_layer(name):
    v, _, parallel, sequential, scale = load(name)
    update, shift = hydra_lora(v["in_W0"], v["in_bias"], parallel, sequential, scale)
    W, b = v["in_W0"] + update.B @ update.A, v["in_bias"] + shift
    torch.testing.assert_close(F.linear(v["in_x"], W, b), v["official_y"], **EXACTLY)
    for origin in ("official", "derived"):
        if f"{origin}_merged_W" in v:
            torch.testing.assert_close(W, v[f"{origin}_merged_W"], **EXACTLY)
            torch.testing.assert_close(b, v[f"{origin}_merged_b"], **EXACTLY)


def random_branch(r, width_in, width_out, generator, biases):
    A = torch.randn(r, width_in, generator=generator)
    B = torch.randn(width_out, r, generator=generator)
    if not biases:
        return Branch(A, B)
    a, c = torch.randn(r, generator=generator), torch.randn(width_out, generator=generator)
    return Branch(A, B, a, c)


@pytest.mark.parametrize(("m", "n"), [(5, 17), (17, 5), (1, 1)])
@pytest.mark.parametrize("which", ["both", "parallel", "sequential"])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_fold_is_exact_for_any_shape(m, n, which, biases, with_bias):
    generator = torch.Generator().manual_seed(m)
    W0 = torch.randn(n, m, generator=generator).T
    b0 = torch.randn(m, generator=generator) if with_bias else None
    parallel = random_branch(1, n, m, generator, biases) if which != "sequential" else None
    sequential = random_branch(1, m, m, generator, biases) if which != "parallel" else None
    x = torch.randn(n, generator=generator)
    y = hydra_output(F.linear(x, W0, b0), x, parallel, sequential, 0.5)
    update, shift = hydra_lora(W0, b0, parallel, sequential, 0.5)
    assert len(update.A) == (2 if which == "both" else 1)
    assert (shift is None) == (not biases and (which == "parallel" or b0 is None))
    bias = torch.zeros(m) + (0 if b0 is None else b0) + (0 if shift is None else shift)
    torch.testing.assert_close(F.linear(x, W0 + update.B @ update.A, bias), y)


def test_bias_of_one_side_alone():
    x, W0 = torch.ones(2), torch.zeros(3, 2)
    for biases in ({"a": torch.ones(1)}, {"c": torch.ones(3)}):
        branch = Branch(torch.ones(1, 2), torch.full((3, 1), 2.0), **biases)
        update, shift = hydra_lora(W0, None, branch, None)
        y = hydra_output(W0 @ x, x, branch, None)
        torch.testing.assert_close(update.B @ (update.A @ x) + shift, y)


def test_branches_with_a_zero_up_projection_change_nothing():
    generator = torch.Generator().manual_seed(0)
    x, W0 = torch.randn(4, 6, generator=generator), torch.randn(3, 6, generator=generator)
    h = x @ W0.T
    parallel, sequential = (
        Branch(torch.randn(2, n, generator=generator), torch.zeros(3, 2)) for n in (6, 3)
    )
    assert torch.equal(hydra_output(h, x, parallel, sequential, 10.0), h)


def test_half_precision_weights_fold_in_float32():
    generator = torch.Generator().manual_seed(0)
    W0 = torch.randn(8, 6, generator=generator).bfloat16()
    sequential = random_branch(2, 8, 8, generator, biases=False)
    update, _ = hydra_lora(W0, None, None, sequential)
    assert update.A.dtype == torch.float32
    torch.testing.assert_close(update.A, sequential.A @ W0.float())


def fitted(target, W0, ranks, lr, steps=400):
    """Loss of branches trained by Adam to put out what the target weight does, at each step."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, W0.shape[1], generator=generator)
    h, wanted = x @ W0.T, x @ target.T
    sides = [W0.shape[1], W0.shape[0]]
    branches, trained = [], []
    for r, width in zip(ranks, sides, strict=True):
        if not r:
            branches.append(None)
            continue
        A = (torch.rand(r, width, generator=generator) * 2 - 1) / width**0.5
        branches.append(Branch(A.requires_grad_(), torch.zeros(len(W0), r).requires_grad_()))
        trained += [branches[-1].A, branches[-1].B]
    optimizer = torch.optim.Adam(trained, lr=lr)
    losses = []
    for _ in range(steps):
        loss = (hydra_output(h, x, *branches) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def best(target, W0, ranks):
    return min((fitted(target, W0, ranks, lr) for lr in (3e-3, 1e-2, 3e-2)), key=lambda x: x[-1])


def problem():
    generator = torch.Generator().manual_seed(0)
    W0 = torch.randn(24, 40, generator=generator) / 40**0.5
    U, V = (torch.randn(24, 2, generator=generator) / 24**0.5 for _ in range(2))
    return W0, U, V, torch.randn(2, 40, generator=generator) / 40**0.5


def test_the_sequential_branch_recombines_outputs_sooner():
    W0, U, V, _ = problem()
    target = W0 + 2 * U @ V.T @ W0
    parallel, sequential, hydra = (best(target, W0, ranks) for ranks in ((2, 0), (0, 2), (2, 2)))
    assert max(sequential[50], hydra[50]) < parallel[50] / 3
    assert max(parallel[-1], sequential[-1], hydra[-1]) < 1e-6


def test_only_the_parallel_branch_reaches_new_features():
    W0, U, _, V = problem()
    target = W0 + U @ V
    parallel, sequential, hydra = (best(target, W0, ranks) for ranks in ((2, 0), (0, 2), (2, 2)))
    assert sequential[-1] > 0.1 * sequential[0]
    assert max(parallel[-1], hydra[-1]) < 1e-8


@pytest.mark.parametrize(
    ("parallel", "sequential", "message"),
    [
        (None, None, "without a branch"),
        (Branch(torch.ones(1, 3), torch.ones(4, 1)), None, "parallel branch"),
        (None, Branch(torch.ones(1, 2), torch.ones(4, 1)), "sequential branch"),
        (Branch(torch.ones(2, 2), torch.ones(4, 1)), None, "parallel branch"),
    ],
)
def test_bad_input(parallel, sequential, message):
    with pytest.raises(InputError, match=message):
        hydra_lora(torch.ones(4, 2), None, parallel, sequential)
