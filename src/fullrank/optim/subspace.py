"""Subspaces of a gradient: where a stateful update runs, and how it gets there and back.

A :class:`Subspace` belongs to one weight matrix. ``down`` takes an ``(m, n)`` gradient to the
small array that the inner update works on, ``up`` adds the small array's image to an ``(m, n)``
array, ``fit`` chooses the next subspace. What it holds are plain tensors (``state``), which the
optimizer keeps in its own ``state`` and saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, Self, get_args, runtime_checkable

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim.foundation import Spec

Side = Literal["left", "right", "full"]
ProjType = Literal["std", "reverse_std", "left", "right", "full"]
MomentPolicy = Literal["keep", "reset", "rotate"]

# Bases in these are orthonormal to rounding when they come out of a factorisation.
_PRECISE = (torch.float32, torch.float64)


def side_of(proj_type: ProjType, shape: tuple[int, int]) -> Side:
    """Which side of an ``(m, n)`` gradient is projected.

    ``"std"`` compresses the short side (square matrices: right), ``"reverse_std"`` the long one.

    >>> side_of("std", (1376, 512)), side_of("std", (512, 1376)), side_of("reverse_std", (8, 8))
    ('right', 'left', 'left')
    """
    m, n = shape
    if proj_type == "std":
        return "right" if m >= n else "left"
    if proj_type == "reverse_std":
        return "left" if m >= n else "right"
    if proj_type not in get_args(ProjType):
        raise InputError(f"unknown proj_type {proj_type!r}; it is one of {get_args(ProjType)}")
    return proj_type


@runtime_checkable
class Subspace(Protocol):
    """Where one matrix's stateful update runs."""

    @property
    def side(self) -> str:
        """Which kind it is, in a word for a ``projection_hook``."""
        ...

    @property
    def draws(self) -> bool:
        """Whether ``fit`` needs a generator."""
        ...

    @property
    def entrywise(self) -> bool:
        """Whether entries of a gradient are either inside or outside."""
        ...

    @property
    def fitted(self) -> bool:
        """Whether a subspace has been chosen yet; reads from the device after ``restore``."""
        ...

    @property
    def state(self) -> dict[str, Tensor]:
        """What defines the subspace, as plain tensors under the names they are saved by."""
        ...

    def expected(self, shape: tuple[int, int], dtype: torch.dtype) -> Spec:
        """Shape and dtype of the tensors in :attr:`state` for an ``(m, n)`` matrix of ``dtype``."""
        ...

    def small_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of ``down(G)`` for a gradient ``G`` of the given ``(m, n)``."""
        ...

    def restore(self, state: dict[str, Tensor]) -> Self:
        """Return the subspace of this kind that ``state`` defines, sharing its tensors."""
        ...

    def fit(self, weight: Tensor, grad: Tensor, generator: torch.Generator | None = None) -> Self:
        """Choose the next subspace from the current weight and gradient."""
        ...

    def down(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Take a gradient into the subspace; into ``out`` if given, whose dtype then counts."""
        ...

    def up(
        self, small: Tensor, out: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
    ) -> Tensor:
        """Return ``beta * out + alpha * up(small)``, in place when ``out`` is given."""
        ...

    def residual(self, grad: Tensor, small: Tensor, out: Tensor) -> Tensor:
        """Write ``G - up(small)`` to ``out``: what of the gradient lies outside."""
        ...

    def transport(self, old: Self, moments: Sequence[Tensor], policy: MomentPolicy) -> None:
        """Carry first moments, in place, from the subspace ``old`` to this one."""
        ...

    def align(self, old: Self) -> None:
        """Undo what is arbitrary in this choice, such as signs, by likeness to the old one."""
        ...

    def inject(self, given: Sequence[Tensor], like: Tensor) -> Self:
        """Return the subspace of this kind that a caller chose, for a matrix ``like`` this."""
        ...


class Projection:
    """A subspace given by orthonormal bases of one side of the matrix, or of both.

    ``right``: ``P`` is ``(r, n)`` with orthonormal rows and ``down(G) = G P^T``; ``left``: ``P`` is
    ``(m, r)`` with orthonormal columns and ``down(G) = P^T G``; ``full``: ``P_left^T G P_right^T``.
    Subclasses say how the bases are chosen.

    Parameters
    ----------
    rank
        Dimension r, at most the length of each projected side.
    side
        ``"left"``, ``"right"`` or ``"full"``; see :func:`side_of`.
    left, right
        The bases, absent until :meth:`fit` or :meth:`restore`; columns in memory: CPUs prefer it.
    gemm
        Dtype that ``down``, ``up`` and ``residual`` round factors of matrix products to (sums are
        in float32); None leaves them as they are.
    """

    draws = False
    entrywise = False

    def __init__(
        self,
        rank: int,
        side: Side,
        left: Tensor | None = None,
        right: Tensor | None = None,
        gemm: torch.dtype | None = None,
    ) -> None:
        if rank < 1:
            raise InputError(f"a subspace of rank {rank}; the rank must be at least 1")
        self.rank = rank
        self.side: Side = side
        self.left = None if left is None else left.contiguous()
        self.right = None if right is None else right.t().contiguous().t()
        self.gemm = gemm
        # `fit` may have projected its gradient already: (that gradient, the result).
        self._ready: tuple[Tensor, Tensor] | None = None
        self._fitted: bool | None = None
        self._exact: bool | None = None
        self._gram: Tensor | None = None

    @property
    def fitted(self) -> bool:
        """Whether the bases are there, and not the zeros that a state is allocated with."""
        if self._fitted is None:
            bases = self.state.values()
            self._fitted = bool(bases) and all(bool(basis.any()) for basis in bases)
        return self._fitted

    @property
    def state(self) -> dict[str, Tensor]:
        """The bases: ``basis_left`` and, or, ``basis_right``. The name says the side."""
        named = {"basis_left": self.left, "basis_right": self.right}
        return {name: basis for name, basis in named.items() if basis is not None}

    def expected(self, shape: tuple[int, int], dtype: torch.dtype) -> Spec:
        """Shape and dtype of the bases for an ``(m, n)`` matrix."""
        m, n = shape
        every: Spec = {
            "basis_left": ((m, self.rank), dtype),
            "basis_right": ((self.rank, n), dtype),
        }
        return every if self.side == "full" else {f"basis_{self.side}": every[f"basis_{self.side}"]}

    def small_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """``(m, r)`` on the right, ``(r, n)`` on the left, ``(r, r)`` on both."""
        m, n = shape
        return (
            self.rank if self.side in ("left", "full") else m,
            self.rank if self.side in ("right", "full") else n,
        )

    def restore(self, state: dict[str, Tensor]) -> Self:
        """Return the projection with the bases in ``state``."""
        left, right = state.get("basis_left"), state.get("basis_right")
        return type(self)(self.rank, self.side, left, right, self.gemm)

    def _with(self, left: Tensor | None, right: Tensor | None) -> Self:
        """Return the projection on bases that were just made: nobody needs to look at them."""
        new = type(self)(self.rank, self.side, left, right, self.gemm)
        new._fitted = True
        new._exact = all(b.dtype in _PRECISE for b in new.state.values())
        return new

    def inject(self, given: Sequence[Tensor], like: Tensor) -> Self:
        """Return the projection on these bases: one, or (left, right) for ``"full"``."""
        expected = self.expected((like.shape[0], like.shape[1]), like.dtype)
        shapes = [tuple(basis.shape) for basis in given]
        needed = [shape for shape, _ in expected.values()]
        if shapes != needed:
            raise InputError(f"bases of shape {shapes}; side {self.side!r} needs {needed}")
        bases = (b.detach().to(like.device, like.dtype, copy=True) for b in given)
        return self.restore(dict(zip(expected, bases, strict=True)))

    def fit(self, weight: Tensor, grad: Tensor, generator: torch.Generator | None = None) -> Self:
        """Choose bases for the current gradient."""
        raise NotImplementedError

    def down(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Project a gradient (see the class)."""
        if self._ready is not None:
            source, small = self._ready
            self._ready = None
            if source is grad:
                return small.contiguous() if out is None else out.copy_(small)
        left, right = self._bases()
        if out is not None and out.dtype != grad.dtype:
            return out.copy_(self.down(grad))
        if left is None:
            assert right is not None
            return self._mm(grad, right.t(), out)
        if right is None:
            return self._mm(left.t(), grad, out)
        return self._mm(self._mm(left.t(), grad), right.t(), out)

    def _mm(self, first: Tensor, second: Tensor, out: Tensor | None = None) -> Tensor:
        if self.gemm is None:
            return torch.mm(first, second, out=out)
        product = torch.mm(first.to(self.gemm), second.to(self.gemm))
        return product.to(first.dtype) if out is None else out.copy_(product)

    def up(
        self, small: Tensor, out: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
    ) -> Tensor:
        """Return ``beta * out + alpha * back(small)``; one GEMM and no full-size temporary."""
        first, second = self._factors(small)
        if out is None:
            return torch.mm(first, second).to(small.dtype).mul_(alpha)
        if out.dtype != first.dtype:
            return out.mul_(beta).add_(torch.mm(first, second), alpha=alpha)
        return out.addmm_(first, second, beta=beta, alpha=alpha)

    def _factors(self, small: Tensor) -> tuple[Tensor, Tensor]:
        """What ``back(small)`` is the product of, in the dtype of the GEMM."""
        left, right = self._bases()
        basis = left if left is not None else right
        assert basis is not None
        # Half-precision bases meet moments in float32: the GEMM runs in the weights' dtype.
        small = small.to(basis.dtype)
        if left is None:
            first, second = small, basis
        elif right is None:
            first, second = left, small
        else:
            first, second = self._mm(left, small), right
        return (first, second) if self.gemm is None else (first.to(self.gemm), second.to(self.gemm))

    def _bases(self) -> tuple[Tensor | None, Tensor | None]:
        if self.left is None and self.right is None:
            raise InputError("this subspace has no basis yet: call fit(weight, grad) first")
        return self.left, self.right

    def residual(self, grad: Tensor, small: Tensor, out: Tensor) -> Tensor:
        """Write ``G - back(small)`` to ``out``; one GEMM."""
        first, second = self._factors(small)
        if first.dtype == out.dtype:
            return torch.addmm(grad, first, second, alpha=-1.0, out=out)
        out.copy_(torch.mm(first, second))
        return torch.sub(grad, out, out=out)

    def bands(self, rows: int, *small: Tensor) -> Iterator[tuple[Self, Sequence[Tensor]]]:
        """Yield the subspace of so many rows of the matrix at a time, and small arrays of these."""
        if self.left is None:
            for parts in zip(*(torch.split(each, rows) for each in small), strict=True):
                yield self, parts
        else:
            for left in torch.split(self.left, rows):
                yield self._with(left, self.right), small

    def line_norms(self, small: Tensor, own: Tensor) -> Tensor:
        """Squared norms of ``back(small)``: its rows' for ``right``, its columns' for ``left``.

        They are those of ``small``, which are ``own``, while the basis is orthonormal; where it is
        so only to a low precision, or was given by a caller, its Gram matrix makes up for the
        difference.
        """
        if self._exact:
            return own
        if self.left is None:
            assert self.right is not None
            basis, lines = self.right.t(), small
        else:
            basis, lines = self.left, small.t()
        if self._gram is None:
            wide = basis.to(small.dtype)
            self._gram = wide.t() @ wide
            if self._exact is None and basis.dtype in _PRECISE:
                one = torch.eye(self.rank, dtype=small.dtype, device=small.device)
                loose = 1000.0 * torch.finfo(basis.dtype).eps
                self._exact = bool((self._gram - one).abs().max() <= loose)
                if self._exact:
                    return own
        return (lines @ self._gram).mul_(lines).sum(1)

    def align(self, old: Self) -> None:
        """Flip basis vectors so that ``diag(P_new P_old^T) >= 0``.

        Singular vectors have no sign of their own, but moments that are kept do.
        """
        left, right = self._signs(old)
        if left is not None and self.left is not None:
            self.left.mul_(left)
        if right is not None and self.right is not None:
            self.right.mul_(right.unsqueeze(1))
        if self._ready is not None:
            small = self._ready[1]
            if left is not None:
                small.mul_(left.unsqueeze(1))
            if right is not None:
                small.mul_(right)

    def _signs(self, old: Self) -> tuple[Tensor | None, Tensor | None]:
        def signs(new: Tensor | None, before: Tensor | None, dim: int) -> Tensor | None:
            if new is None or before is None:
                return None
            agreement = (new * before.to(new.dtype)).sum(dim)
            return torch.where(agreement < 0, -1.0, 1.0).to(new.dtype)

        return signs(self.left, old.left, 0), signs(self.right, old.right, 1)

    def transport(self, old: Self, moments: Sequence[Tensor], policy: MomentPolicy) -> None:
        """``rotate`` re-expresses first moments in the new bases, ``reset`` zeroes them.

        ``keep`` reads them in the new bases as they are, as the GaLore paper does.
        """
        if policy == "keep":
            return
        for moment in moments:
            if policy == "reset":
                moment.zero_()
                continue
            turned = moment
            if self.left is not None and old.left is not None:
                turn = self.left.to(moment.dtype).t() @ old.left.to(moment.dtype)
                turned = turn @ turned
            if self.right is not None and old.right is not None:
                turn = self.right.to(moment.dtype) @ old.right.to(moment.dtype).t()
                turned = turned @ turn.t()
            moment.copy_(turned)


def floats(grad: Tensor) -> Tensor:
    """Factorisations run in float32 at least, in float64 when the gradient is."""
    return grad if grad.dtype in _PRECISE else grad.float()


def leading_bases(grad: Tensor, rank: int, side: Side) -> tuple[Tensor | None, Tensor | None]:
    """Leading ``rank`` singular vectors of a matrix, of the side or sides asked for.

    Returns
    -------
    tuple
        ``(m, r)`` left basis or None, ``(r, n)`` right basis or None, laid out as a
        :class:`Projection` has them. Fresh memory: no view keeps the whole factor alive.
    """
    U, _, Vh = torch.linalg.svd(floats(grad), full_matrices=False)
    left = U[:, :rank].clone(memory_format=torch.contiguous_format)
    right = Vh[:rank].t().clone(memory_format=torch.contiguous_format).t()
    return (left if side != "right" else None), (right if side != "left" else None)


class SVDSubspace(Projection):
    """Leading singular vectors of the current gradient (GaLore, Fira, FRUGAL ``svd``).

    Examples
    --------
    >>> G = torch.outer(torch.arange(1.0, 4.0), torch.tensor([3.0, 4.0]))
    >>> subspace = SVDSubspace(1, "right").fit(torch.zeros(3, 2), G)
    >>> torch.allclose(subspace.up(subspace.down(G)), G)
    True
    """

    def fit(self, weight: Tensor, grad: Tensor, generator: torch.Generator | None = None) -> Self:
        """Take the exact leading singular vectors."""
        return self._with(*(as_basis(b, grad) for b in leading_bases(grad, self.rank, self.side)))


def as_basis(basis: Tensor | None, grad: Tensor) -> Tensor | None:
    """Return a basis in the gradient's dtype."""
    return None if basis is None else basis.to(grad.dtype)
