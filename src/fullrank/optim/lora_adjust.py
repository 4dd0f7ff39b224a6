"""LoRA-Pro's adjustment: LoRA's step closest to a step on the whole weight (arXiv 2407.18242).

Everything here works on one pair of factors or on a stack of pairs of the same shapes, and in
place of an ``(m, n)`` gradient needs only the two that autograd gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.linalg.checks import double
from fullrank.linalg.sylvester import solve_diagonalised
from fullrank.optim.checks import at_least, finite, one_of

Choice = Literal["sylvester", "zero", "symmetry"]
CHOICES: tuple[Choice, ...] = ("sylvester", "zero", "symmetry")

# Of l_i + h_j, beside the largest: far below where the equation says anything in float64.
_SYLVESTER_RTOL = 1e-14


@torch.no_grad()
def adjust_lora_grads(
    A: Tensor,
    B: Tensor,
    g_A: Tensor,
    g_B: Tensor,
    scaling: float,
    x: Choice = "sylvester",
    *,
    delta: float = 1e-8,
    relative_delta: bool = False,
) -> tuple[Tensor, Tensor]:
    """Adjust a pair's gradients so that its step on the weight is closest to full fine-tuning's.

    For ``W = W0 + s B A`` a step ``(dA, dB)`` acts on W as ``s B dA + s dB A``. The one closest
    to ``G = dL/dW`` in the Frobenius norm is::

        dA = s^-2 K_B g_A + X A
        dB = s^-2 (g_B - B K_B B^T g_B) K_A - B X

    with ``K_B = (B^T B + delta I)^-1`` and ``K_A = (A A^T + delta I)^-1``, whatever X is.

    Parameters
    ----------
    A, B
        ``(..., r, n)`` and ``(..., m, r)``, of any floating-point dtype.
    g_A, g_B
        Their gradients, ``s B^T G`` and ``s G A^T``.
    scaling
        s: ``alpha / r``, with rsLoRA ``alpha / sqrt(r)``.
    x
        ``"sylvester"`` (default): the pair nearest to ``(g_A, g_B)``, from
        ``B^T B X + X A A^T = -s^-2 K_B g_A A^T``. ``"zero"``: X = 0. ``"symmetry"``: both terms
        have an equal share in what they overlap, ``X = -(1 / 2 s^2) K_B B^T g_B K_A``.
    delta
        Damping of both inverses: 1e-8, as the official code.
    relative_delta
        Take ``delta`` as a part of the mean eigenvalue of ``B^T B`` (and ``A A^T``) each: it
        damps as much at the first steps, when B is next to nothing, as later.

    Returns
    -------
    tuple of Tensor
        dA and dB in the dtype of A and B. The ``r x r`` algebra is done in float64, the products
        with long sides in float32 at least.

    Raises
    ------
    InputError
        On shapes that do not fit, a scaling of 0, or an unknown ``x``.

    Notes
    -----
    The only factorisations are those of the two ``r x r`` Gram matrices. On CUDA ``eigh`` reads
    one error flag a call from the device.

    Examples
    --------
    >>> A, B = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [2.0]])
    >>> G = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> dA, dB = adjust_lora_grads(A, B, B.T @ G, G @ A.T, scaling=1.0)
    >>> B @ dA + dB @ A  # all of G that a pair can move: B's column and A's row
    tensor([[1.0000, 0.0000],
            [3.0000, 4.0000]])
    """
    check_shapes(A, B, g_A, g_B)
    one_of(*CHOICES)("x", x)
    finite("scaling", scaling)
    at_least(0.0)("delta", delta)
    if scaling == 0:
        raise InputError("scaling=0: such a pair does not act on the weight at all")
    algebra = PairAlgebra.of(A, B, delta, relative_delta)
    dA, dB = algebra.adjust(g_A, g_B, scaling, x)
    return dA.to(A.dtype), dB.to(B.dtype)


def check_shapes(A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor) -> None:
    """Raise :class:`InputError` unless A is ``(..., r, n)``, B ``(..., m, r)``, gradients alike."""
    fits = A.dim() >= 2 and B.dim() == A.dim() and B.shape[-1] == A.shape[-2]
    if not (fits and A.shape[:-2] == B.shape[:-2] and A.is_floating_point()):
        raise InputError(
            f"A has shape {tuple(A.shape)} and B {tuple(B.shape)}; expected real (..., r, n) and "
            "(..., m, r)"
        )
    if g_A.shape != A.shape or g_B.shape != B.shape:
        raise InputError(
            f"gradients of shape {tuple(g_A.shape)} and {tuple(g_B.shape)} for factors of shape "
            f"{tuple(A.shape)} and {tuple(B.shape)}; each must have its factor's shape"
        )


@dataclass(frozen=True, slots=True)
class PairAlgebra:
    """A stack of pairs, and what of them every adjustment needs: two eigendecompositions.

    Attributes
    ----------
    A, B
        The factors, in float32 at least.
    left, U
        Eigenvalues and eigenvectors of ``B^T B``, in float64.
    right, V
        The same of ``A A^T``.
    K_A, K_B
        Damped pseudo-inverses of the two, ``(..., r, r)``, in float64.
    """

    A: Tensor
    B: Tensor
    left: Tensor
    U: Tensor
    right: Tensor
    V: Tensor
    K_A: Tensor
    K_B: Tensor

    @classmethod
    def of(cls, A: Tensor, B: Tensor, delta: float, relative_delta: bool = False) -> Self:
        """Factorise the Gram matrices of A ``(..., r, n)`` and B ``(..., m, r)``."""
        wide_A, wide_B = double(A), double(B)
        grams = torch.stack([wide_B.mT @ wide_B, wide_A @ wide_A.mT])
        values, vectors = torch.linalg.eigh(grams)
        values = values.clamp_min(0.0)
        damping = values.mean(dim=-1, keepdim=True) * delta if relative_delta else delta
        inverse = _pinv(values, damping, torch.finfo(A.dtype).eps)
        K = (vectors * inverse.unsqueeze(-2)) @ vectors.mT
        work = torch.promote_types(A.dtype, torch.float32)
        return cls(A.to(work), B.to(work), values[0], vectors[0], values[1], vectors[1], K[1], K[0])

    def adjust(self, g_A: Tensor, g_B: Tensor, scaling: float, x: Choice) -> tuple[Tensor, Tensor]:
        """Return (dA, dB), in float32 at least; see :func:`adjust_lora_grads`."""
        A, B, wide_gB = self.A, self.B, double(g_B)
        s2 = scaling**-2
        K_A, K_B = s2 * self.K_A, s2 * self.K_B
        # What of g_B K_A lies in B's columns, as their coefficients: K_B B^T g_B K_A.
        inside = self.K_B @ (double(B).mT @ wide_gB) @ K_A
        X = self._x(K_B, double(g_A), inside, x)
        work, device = A.dtype, A.device
        dA = K_B.to(device, work) @ g_A.to(work)
        if X is not None:
            inside = inside + X
            dA = dA + X.to(device, work) @ A
        dB = g_B.to(work) @ K_A.to(device, work) - B @ inside.to(device, work)
        return dA, dB

    def _x(self, K_B: Tensor, g_A: Tensor, inside: Tensor, x: Choice) -> Tensor | None:
        if x == "zero":
            return None
        if x == "symmetry":
            return -0.5 * inside
        rhs = -K_B @ (g_A @ double(self.A).mT)
        return solve_diagonalised(self.left, self.U, self.right, self.V, rhs, rtol=_SYLVESTER_RTOL)

    def equivalent_factors(self, g_A: Tensor, g_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Return what the adjusted step is on the weight, ``s B dA + s dB A``, as two factors.

        ``(..., m, 2r)`` and ``(..., 2r, n)``; their product is the same for every X.
        """
        dA, dB = self.adjust(g_A, g_B, scaling, "zero")
        left = torch.cat([self.B, dB], dim=-1) * scaling
        return left, torch.cat([dA, self.A], dim=-2)


def _pinv(values: Tensor, delta: Tensor | float, eps: float) -> Tensor:
    """Eigenvalues of the damped pseudo-inverse of a Gram matrix.

    The factor's own rounding shows in the Gram matrix as ``(r eps)^2``: what is smaller is no
    direction of the factor, and dividing its noise by delta would make it one.
    """
    largest = values.amax(dim=-1, keepdim=True)
    rank = values.shape[-1]
    damped = values + delta
    noise = values < (rank * eps) ** 2 * largest
    singular = damped <= rank * torch.finfo(values.dtype).eps * (largest + delta)
    null = noise | singular
    return torch.where(null, 0.0, 1.0 / torch.where(null, 1.0, damped))
