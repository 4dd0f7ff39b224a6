"""Matrix products in bfloat16: close to float32's, and nothing else is rounded."""

import pytest
import torch
from stepping import parameter, random_grads, run

from fullrank.core.errors import InputError
from fullrank.optim import (
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    Projection,
    SVDSubspace,
)

HALF = 2.0**-8


@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_products_are_rounded_to_the_dtype_and_results_are_not(side):
    G = torch.randn(24, 32)
    exact = SVDSubspace(6, side).fit(G, G)
    rounded = Projection(6, side, exact.left, exact.right, torch.bfloat16)
    small = exact.down(G)
    found = rounded.down(G)
    assert found.dtype == torch.float32
    assert 0 < (found - small).norm() < 4 * HALF * small.norm()
    assert rounded.down(G, out=torch.empty_like(small)).dtype == torch.float32
    W = torch.randn(24, 32)
    whole = exact.up(small, out=W.clone(), alpha=-0.5, beta=0.9)
    other = rounded.up(small, out=W.clone(), alpha=-0.5, beta=0.9)
    assert other.dtype == torch.float32
    # What was there is not rounded: only what is added.
    assert 0 < (other - whole).norm() < 2 * HALF * exact.up(small).norm()
    rest = [space.residual(G, small, torch.empty_like(G)) for space in (exact, rounded)]
    assert 0 < (rest[0] - rest[1]).norm() < 4 * HALF * small.norm()
    # Rows of it are the same subspace.
    found = [own.up(part) for own, (part,) in rounded.bands(8, small)]
    assert [len(each) for each in found[:-1]] == [8] * (len(found) - 1)
    torch.testing.assert_close(torch.cat(found), rounded.up(small))


KINDS = {
    "galore": (GaLoreAdamW, {"rank": 6}),
    "adafactor": (GaLoreAdafactor, {"rank": 6, "relative_step": False}),
    "fira": (FiraAdamW, {"rank": 6}),
    "gradnorm": (GradNormLoRPAdamW, {"rank": 6}),
    "svd": (FrugalAdamW, {"subspace": "svd", "state_free": "sgd"}),
    "random": (FrugalAdamW, {"subspace": "random", "state_free": "sgd"}),
}


@pytest.mark.parametrize("refresh", ["svd", "subspace"])
@pytest.mark.parametrize("name", KINDS)
def test_steps_are_close_to_those_in_float32(name, refresh):
    kind, options = KINDS[name]
    found = {}
    for gemm in (None, "bfloat16"):
        torch.manual_seed(0)
        W, b = parameter(24, 32), parameter(7)
        group = {"params": [W]} | ({"is_proj_params": True} if kind is FrugalAdamW else {})
        optimizer = kind(
            [group, {"params": [b], "rank": None}], lr=0.01, refresh=refresh, gemm=gemm, **options
        )
        start = W.detach().clone()
        run(optimizer, [W, b], random_grads([W, b], 5))
        found[gemm] = W.detach() - start, b.detach().clone()
        assert {v.dtype for v in optimizer.state[W].values()} <= {torch.float32, torch.int64}
    moved, other = found[None][0], found["bfloat16"][0]
    assert 0 < (other - moved).norm() < 0.03 * moved.norm()
    assert torch.equal(found[None][1], found["bfloat16"][1])


def test_other_dtypes_are_refused():
    with pytest.raises(InputError, match=r"gemm='float16'; it is one of None, 'bfloat16'"):
        GaLoreAdamW([parameter(8, 8)], rank=2, gemm="float16")
