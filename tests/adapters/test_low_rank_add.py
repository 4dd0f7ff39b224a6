"""The fused addition of an update: values, gradients, types, autocast."""

import pytest
import torch

from fullrank.adapters.flylora_routing import flylora_output, sparse_projection
from fullrank.adapters.hydra_branches import Branch, hydra_output
from fullrank.adapters.low_rank_add import add_low_rank


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3)])
def test_it_is_the_sum(lead):
    h, z, B = numbers(*lead, 5), numbers(*lead, 2, seed=1), numbers(5, 2, seed=2)
    torch.testing.assert_close(add_low_rank(h, z, B, 0.5), h + 0.5 * z @ B.T)


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
def test_the_type_is_that_of_the_output(dtypes):
    of_h, of_B = dtypes
    h, z, B = (t.detach() for t in (numbers(3, 5), numbers(3, 2), numbers(5, 2)))
    y = add_low_rank(h.to(of_h), z.to(of_B), B.to(of_B), 2.0)
    assert y.dtype == of_h
    torch.testing.assert_close(y, (h.to(of_h) + 2.0 * (z.to(of_B) @ B.to(of_B).T)).to(of_h))


def test_autocast_keeps_the_type_of_the_output():
    h, z, B = (t.detach().float() for t in (numbers(3, 5), numbers(3, 2), numbers(5, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        y = add_low_rank(h.bfloat16(), z, B)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), h + z @ B.T, rtol=3e-2, atol=3e-2)


def test_gradients_of_flylora():
    A, d = sparse_projection(6, 10, 0.5).double(), torch.zeros(6, dtype=torch.float64)

    def run(h, x, B):
        return flylora_output(h, x, A, B, d, [(4, 2), (2, 1)], 2.0)[0]

    # Steps of 1e-6 flip no choice: the answers are farther apart than that.
    assert torch.autograd.gradcheck(run, (numbers(4, 3), numbers(4, 10, seed=1), numbers(3, 6)))


@pytest.mark.parametrize("biases", [False, True])
def test_gradients_of_hydra(biases):
    a, c = (numbers(2, seed=5), numbers(3, seed=6)) if biases else (None, None)
    W0 = numbers(3, 7, seed=9).detach()

    def run(x, A_p, B_p, A_s, B_s):
        branches = Branch(A_p, B_p, a, c), Branch(A_s, B_s, a, c)
        return hydra_output(x @ W0.T, x, *branches, 0.5)

    sizes = [(4, 7), (2, 7), (3, 2), (2, 3), (3, 2)]
    assert torch.autograd.gradcheck(run, [numbers(*s, seed=i) for i, s in enumerate(sizes)])


def test_a_second_hydra_adapter_sees_the_base():
    x, W0 = numbers(4, 7), numbers(3, 7, seed=1)
    h = x @ W0.T
    one, two = (Branch(numbers(2, 3, seed=s), numbers(3, 2, seed=s + 1)) for s in (2, 4))
    both = hydra_output(hydra_output(h, x, None, one), x, None, two, base=h)
    torch.testing.assert_close(both, h + h @ one.A.T @ one.B.T + h @ two.A.T @ two.B.T)


def test_dropout_lies_between_the_projections():
    x, h = numbers(4, 7), numbers(4, 3, seed=1)
    branch = Branch(numbers(2, 7, seed=2), numbers(3, 2, seed=3))
    y = hydra_output(h, x, branch, None, dropout=lambda z: 3 * z)
    torch.testing.assert_close(y, h + 3 * x @ branch.A.T @ branch.B.T)
