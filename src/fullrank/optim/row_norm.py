"""Row-norm reparametrisation: a weight as magnitudes times unit rows (weight normalisation).

``W = g v / ||v||`` with one magnitude g a row. The gradient that the subspace sees is that of the
direction v, and the magnitudes are stepped by Adam beside it.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fullrank.optim.foundation import Spec, State
from fullrank.optim.outside import Move
from fullrank.optim.subspace import Projection

Mode = Literal["consistent", "official"]

# Rows shorter than this have no direction.
_TINY = 1e-12
# A row that differs by more than this share from its magnitude was changed from outside.
_CHANGED = 1e-3


class Reparametrisation(Protocol):
    """Another way to write a weight: which gradient the subspace sees, and the way back."""

    whole: bool
    """Whether it is for what is not projected, too."""

    def expected(self, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
        """Shape and dtype of what is kept, the magnitudes' moments aside."""
        ...

    def fill(self, weight: Tensor, state: State) -> None:
        """First values from the weight."""
        ...

    def gradients(
        self, weight: Tensor, grad: Tensor, state: State, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of the direction (in ``out``) and of the magnitudes, ``(m, 1)``."""
        ...

    def write(self, move: Move, magnitude_step: Tensor, decay: float) -> None:
        """Change the weight; ``magnitude_step`` is taken off, then ``decay`` multiplied in."""
        ...


def weight_norm_gradients(
    weight: Tensor, grad: Tensor, magnitude: Tensor, norm: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``W = g v / ||v||_row`` with respect to v and g.

    Parameters
    ----------
    weight, grad
        W and its gradient, ``(m, n)``.
    magnitude, norm
        g and ``||v||``, ``(m, 1)``.
    out
        Where the first is written.

    Returns
    -------
    tuple
        ``(g / ||v||) (G - grad_g u)`` and ``grad_g = rowsum(G u)`` with ``u = v / ||v||``. Rows
        without a direction get G itself and 0.

    Examples
    --------
    >>> W, G = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    >>> grad_v, grad_g = weight_norm_gradients(W, G, torch.tensor([[5.0]]), torch.tensor([[1.0]]))
    >>> grad_g
    tensor([[0.6000]])
    """
    alive = (magnitude != 0.0) & (norm > _TINY)
    g = torch.where(alive, magnitude, 1.0)
    radial = torch.where(alive, _row_dot(grad, weight, magnitude.dtype, out) / g, 0.0)
    scale = torch.where(alive, g / norm, 1.0)
    dtype = grad.dtype
    tangent = torch.mul(grad, scale.to(dtype), out=out)
    tangent.addcmul_(weight.to(dtype), (radial * scale / g).to(dtype), value=-1.0)
    return tangent, radial


def _row_dot(a: Tensor, b: Tensor, dtype: torch.dtype, scratch: Tensor | None = None) -> Tensor:
    if a.dtype != dtype or b.dtype != dtype:
        a, b, scratch = a.to(dtype), b.to(dtype), None
    return torch.mul(a, b, out=scratch).sum(1, keepdim=True)


class RowNorm:
    """The exact reparametrisation: magnitudes accumulate, v is implied by W, g and ``||v||``."""

    whole = False

    def expected(self, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
        """``magnitude`` and ``direction_norm``, one number a row each."""
        return {"magnitude": ((rows, 1), dtype), "direction_norm": ((rows, 1), dtype)}

    def fill(self, weight: Tensor, state: State) -> None:
        """Both are the norms of the rows: ``v = W``."""
        norms = _row_norm(weight, state["magnitude"].dtype)
        state["magnitude"].copy_(norms)
        state["direction_norm"].copy_(norms)

    def gradients(
        self, weight: Tensor, grad: Tensor, state: State, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :func:`weight_norm_gradients`.

        A row that was changed since the last step, as when other weights are loaded, is taken as it
        is then.
        """
        g, norm = state["magnitude"], state["direction_norm"]
        length = _row_norm(weight, g.dtype)
        info = torch.finfo(weight.dtype)
        loose = max(_CHANGED, 4 * info.eps) * g.abs() + info.tiny * weight.shape[1] ** 0.5
        changed = (length - g.abs()).abs() > loose
        g.copy_(torch.where(changed, length, g))
        norm.copy_(torch.where(changed, length, norm))
        return weight_norm_gradients(weight, grad, state["magnitude"], state["direction_norm"], out)

    def write(self, move: Move, magnitude_step: Tensor, decay: float) -> None:
        """Step v and g; W is v with its rows made g long.

        A row that had no direction gets the first one that the step gives it, and its length.
        """
        g, norm = move.state["magnitude"], move.state["direction_norm"]
        alive = (g != 0.0) & (norm > _TINY)
        ratio = torch.where(alive, g / norm, 1.0)
        # (g / ||v||) (v - s up(N)), whose rows point where the new v's do, up to g's sign.
        space, small = _scaled_rows(move.subspace, move.direction, ratio)
        if isinstance(move.size, Tensor):
            small, size = small * move.size, 1.0
        else:
            size = move.size
        space.up(small, out=move.weight, alpha=-size * move.scale, beta=1.0)
        length = _row_norm(move.weight, g.dtype)
        stepped = (g - magnitude_step) * decay
        sign = torch.where(g < 0.0, -1.0, 1.0)
        move.put(norm, torch.where(alive, length / ratio.abs(), length))
        move.put(g, torch.where(alive, stepped, length))
        factor = torch.where(alive & (length > 0.0), g * sign / length, 1.0)
        if move.skip is not None:
            factor = torch.where(move.skip, 1.0, factor)  # rounding alone would move the weight
        move.weight.mul_(factor.to(move.weight.dtype))


class OfficialRowNorm:
    """The official code's form: v is kept whole, magnitudes start anew from ``||v||`` every step.

    The gradient is not made orthogonal to v, and what a magnitude learned is gone a step later:
    v follows plain GaLore, and W is v with its rows rescaled by one Adam step. Vectors are one row.
    A weight that is changed from outside goes back to v.
    """

    whole = True

    def expected(self, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
        """``direction`` (v, as large as the weight) and ``magnitude``."""
        return {"direction": (shape, dtype), "magnitude": ((rows, 1), dtype)}

    def fill(self, weight: Tensor, state: State) -> None:
        """``v = W``."""
        state["direction"].copy_(weight)
        state["magnitude"].copy_(_row_norm(weight, state["magnitude"].dtype))

    def gradients(
        self, weight: Tensor, grad: Tensor, state: State, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient as it is, and its radial part."""
        v, g = state["direction"], state["magnitude"]
        g.copy_(_row_norm(v, g.dtype))
        dot = _row_dot(grad, v, g.dtype, out)
        return grad, torch.where(g > _TINY, dot / g.clamp_min(_TINY), 0.0)

    def write(self, move: Move, magnitude_step: Tensor, decay: float) -> None:
        """Step both; W is v with rows of the stepped length."""
        v, g = move.state["direction"], move.state["magnitude"]
        size, small = move.size, move.direction
        if isinstance(size, Tensor):
            small, size = small * size, 1.0
        move.subspace.up(small, out=v, alpha=-size * move.scale * decay, beta=decay)
        alive = g > _TINY
        g.sub_(magnitude_step).mul_(decay)
        length = _row_norm(v, g.dtype)
        g.copy_(torch.where(alive, g, length))
        factor = torch.where(length > 0.0, g / length, 1.0)
        torch.mul(v, factor, out=move.weight) if v.dtype == move.weight.dtype else (
            move.weight.copy_(v * factor)
        )


def _row_norm(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1, keepdim=True, dtype=dtype)
    return norms


def _scaled_rows(subspace: Any, small: Tensor, rows: Tensor) -> tuple[Any, Tensor]:
    """Return a subspace and a small array whose image is ``rows * up(small)``."""
    if isinstance(subspace, Projection) and subspace.left is not None:
        left = subspace.left * rows.to(subspace.left.dtype)
        return Projection(subspace.rank, subspace.side, left, subspace.right, subspace.gemm), small
    return subspace, small * rows.to(small.dtype)
