"""RandLoRA's bases: official numbers, the same bits anywhere, no dead line, checked states."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fullrank.adapters.randlora_bases import (
    Bases,
    Recipe,
    bases_needed,
    packed,
    standardised,
    unpacked,
)
from fullrank.core.errors import InputError, StoreError

FOLDER = Path(__file__).parents[1] / "reference" / "randlora"


def official(name):
    with np.load(FOLDER / f"{name}.npz") as v:
        kind = {"dense": "dense", "sparse": "sparse", "very": "very_sparse"}[str(v["meta_mode"])]
        recipe = Recipe.of(
            [v["meta_shapes"][0].tolist()], int(v["meta_r"]), kind, int(v["meta_key"])
        )
        return recipe, torch.tensor(v["official_basis_A"]), torch.tensor(v["official_basis_B"])


def test_a_key_gives_the_official_float32_bases():
    recipe, A, B = official("wide_r4")
    ours = [standardised(codes) for codes in recipe.draw()]
    torch.testing.assert_close(ours[0], A, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1], B, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["square_sparse_r4", "wide_verysparse_r4"])
def test_sparse_bases_are_the_official_ones_but_for_dead_columns(name):
    recipe, A, B = official(name)
    codes, long = recipe.draw()
    dead = (A[:, 0] == 0).all(0)
    assert dead.any()
    assert torch.equal(codes[:, 0, ~dead], A[:, 0, ~dead].sign().to(torch.int8))
    assert (codes[:, 0, dead] != 0).any(0).all()
    torch.testing.assert_close(standardised(long), B, rtol=1e-6, atol=1e-6)


def test_the_bits_are_known():
    # What a file with a checksum alone relies on, on any machine and with any version of torch.
    dense = Bases(Recipe.of([(40, 24), (24, 24)], 5, key=3)).checksum
    sparse = Bases(Recipe.of([(40, 24), (24, 24)], 5, "sparse", 3)).checksum
    assert bytes(dense.tolist()).hex()[:16] == "08ed17e17bde3704"
    assert bytes(sparse.tolist()).hex()[:16] == "cc5788214b0526a1"


@pytest.mark.parametrize("kind", ["sparse", "very_sparse"])
@pytest.mark.parametrize("r", [1, 2, 7])
def test_no_line_is_dead_in_any_layer(kind, r):
    shapes = [(64, 49), (10, 64), (9, 9)]
    A, B = Recipe.of(shapes, r, kind, key=1).draw()
    assert (A != 0).any(0).all()
    for shape in shapes:
        assert (B[: max(shape), : bases_needed(min(shape), r)] != 0).flatten(1).any(1).all()
    q = 3 if kind == "sparse" else 7
    assert math.isclose((B != 0).float().mean(), 1 / q, abs_tol=0.05)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_spread_is_one_and_codes_are_packed_without_loss(kind):
    for codes in Recipe.of([(70, 30)], 4, kind, key=2).draw():
        assert math.isclose(standardised(codes).double().std(), 1, abs_tol=1e-6)
        assert torch.equal(unpacked(packed(codes)), codes)
        assert packed(codes).element_size() * packed(codes).numel() == codes.numel() * (
            3 if kind == "dense" else 1
        )


def test_extremes_of_24_bits_are_packed():
    codes = torch.tensor([-(1 << 23), -1, 0, 1, (1 << 23) - 1], dtype=torch.int32)
    assert torch.equal(unpacked(packed(codes)), codes)
    assert standardised(torch.tensor([[[-5]]], dtype=torch.int32)).item() == -1


def test_a_state_with_numbers_brings_them_whatever_the_key():
    shapes = [(12, 8), (8, 20)]
    first, second = Bases(Recipe.of(shapes, 3)), Bases(Recipe.of(shapes, 3, key=9), stored=False)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.A, first.A)
    assert torch.equal(second.B, first.B)
    # No key of its gives them: they are stored though only a checksum was asked for.
    third = Bases(Recipe.of(shapes, 3, key=4))
    third.load_state_dict(second.state_dict())
    assert torch.equal(third.B, first.B)


def test_a_checksum_alone_is_compared():
    shapes = [(12, 8)]
    state = Bases(Recipe.of(shapes, 3), stored=False).state_dict()
    assert list(state) == ["checksum"]
    Bases(Recipe.of(shapes, 3), stored=False).load_state_dict(state)
    for other in (
        Recipe.of(shapes, 3, key=1),
        Recipe.of(shapes, 2),
        Recipe.of(shapes, 3, "sparse"),
        Recipe.of([(13, 8)], 3),
    ):
        with pytest.raises(InputError, match="projection_key"):
            Bases(other).load_state_dict(state)
    with pytest.raises(RuntimeError, match="checksum"):
        Bases(Recipe.of(shapes, 3)).load_state_dict({})


def test_damage_and_bases_that_are_too_small_are_errors():
    bases = Bases(Recipe.of([(12, 8)], 3))
    state = copy.deepcopy(dict(bases.state_dict()))
    state["B"][0, 0, 0, 0] += 1
    with pytest.raises(StoreError, match="damaged"):
        Bases(bases.recipe).load_state_dict(state)
    with pytest.raises(InputError, match="too small"):
        Bases(Recipe.of([(13, 8)], 3)).load_state_dict(bases.state_dict())


def test_larger_bases_are_cut():
    large, small = Bases(Recipe.of([(30, 30)], 3)), Bases(Recipe.of([(12, 8)], 3, key=1))
    small.load_state_dict(large.state_dict())
    assert torch.equal(small.B, large.B[:12, :3])
    again = Bases(Recipe.of([(12, 8)], 3))
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.A, large.A[..., :8])


def test_narrow_buffers_hold_the_same_bases():
    recipe = Recipe.of([(12, 8)], 3)
    narrow = Bases(recipe, dtype=torch.bfloat16)
    assert torch.equal(narrow.B, Bases(recipe).B.bfloat16())
    again = Bases(recipe)
    again.load_state_dict(narrow.state_dict())
    assert torch.equal(again.B, Bases(recipe).B)
