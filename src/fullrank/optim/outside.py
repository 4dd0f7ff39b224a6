"""Outside rules: what is done with the part of a gradient that its subspace leaves out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim.foundation import Spec, State
from fullrank.optim.subspace import Projection, Side

StateFreeRule = Literal["sign_sgd", "sgd"]

# Elements of a band of rows.
_BAND = 1 << 16


@dataclass(slots=True)
class Move:
    """One matrix at the moment its weight is changed.

    Without an outside rule it becomes ``after (before W - size scale up(N))``.

    Attributes
    ----------
    weight, grad
        The ``(m, n)`` matrix, to be changed in place, and its gradient.
    subspace, small, direction
        Where the inner update ran, ``R = down(G)``, and its direction N.
    state, group
        The matrix' state, and its param group.
    size
        The inner update's step size, with the learning rate in it.
    scale
        What the way back multiplies by (alpha).
    before, after
        The decay: factors on the weight before, and after, the step.
    scratch
        Gives an array like another to work in; the next call may give the same one.
    skip
        None, or a bool scalar that only the device knows: where it is True, ``grad``, ``small``
        and ``direction`` are zeros, the decay is 1, and the rule leaves what it keeps as it is.
    """

    weight: Tensor
    grad: Tensor
    subspace: Any
    small: Tensor
    direction: Tensor
    state: State
    group: dict[str, Any]
    size: float | Tensor
    scale: float
    before: float
    after: float
    scratch: Callable[[Tensor], Tensor]
    skip: Tensor | None = None

    def put(self, kept: Tensor, value: Tensor) -> None:
        """Write what a rule keeps, unless the step is skipped."""
        kept.copy_(value if self.skip is None else torch.where(self.skip, kept, value))


class OutsideRule(Protocol):
    """Takes the whole step of one matrix, inside and outside."""

    def expected(self, dtype: torch.dtype) -> Spec:
        """Shape and dtype of what the rule keeps."""
        ...

    def fill(self, state: State) -> None:
        """First values of it."""
        ...

    def __call__(self, move: Move) -> None:
        """Change the weight."""
        ...


class StateFree:
    """A step of SGD or of its sign outside (FRUGAL).

    ``W <- before W - size scale up(N) - lr scale free f(G - up(R))`` with ``f`` the sign or the
    identity.

    Parameters
    ----------
    rule
        ``"sign_sgd"`` or ``"sgd"``.
    free
        Factor on the learning rate outside.
    """

    def __init__(self, rule: StateFreeRule, free: float = 1.0) -> None:
        self.rule = rule
        self.free = free

    def expected(self, dtype: torch.dtype) -> Spec:
        """Nothing is kept."""
        return {}

    def fill(self, state: State) -> None:
        """Nothing is kept."""

    def __call__(self, move: Move) -> None:
        """Change the weight; at most one array of its size beside it."""
        rate = float(move.group["lr"]) * move.scale * self.free * move.after
        assert not isinstance(move.size, Tensor)
        step = -move.size * move.scale * move.after
        decay = move.before * move.after
        weight, space = move.weight, move.subspace
        if space.entrywise:
            # f(G - up(R)) is f(G) - up(f(R)): nothing of full size but f(G) is formed.
            inside = self._f(move.small).to(move.direction.dtype).mul(rate)
            if decay != 1.0:
                weight.mul_(decay)
            weight.add_(self._f(move.grad, move.scratch(move.grad)), alpha=-rate)
            space.up(inside.add_(move.direction, alpha=step), out=weight, beta=1.0)
            return
        rows = band(weight)
        parts = zip(
            space.bands(rows, move.small, move.direction),
            torch.split(move.grad, rows),
            torch.split(weight, rows),
            strict=True,
        )
        for (own, (small, direction)), grad, part in parts:
            rest = own.residual(grad, small, out=move.scratch(grad))
            own.up(direction, out=part, alpha=step, beta=decay)
            part.add_(self._f(rest, rest), alpha=-rate)

    def _f(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        return values if self.rule == "sgd" else torch.sign(values, out=out)


def band(matrix: Tensor) -> int:
    """How many rows of a matrix are worked on at a time: several arrays of find room in a cache.

    >>> 1 <= band(torch.empty(3000, 64)) <= 3000
    True
    """
    m, n = matrix.shape
    if matrix.device.type == "cpu":
        return min(max(_BAND * torch.get_num_threads() // max(n, 1), 1), max(m, 1))
    return max(m, 1)


class ScaledResidual:
    """The residual, scaled line by line as Adam scaled the inside, its growth limited (Fira).

    With ``S = G - c up(R)``, ``phi_i = ||N_i|| / (||R_i|| + 1e-8)`` for every line i of the side
    that is not projected, and the limiter l of ``||phi S||_F``, the step is
    ``W <- before W - size (scale up(N) + phi S / l)``.

    phi commutes with the projection, so that neither ``up(R)`` nor S is ever formed: two matrix
    products a step, as without a residual.

    Parameters
    ----------
    leak
        c: what is taken off the gradient is ``c up(R)``.
    limiter
        Largest growth of ``||phi S||_F`` from one step to the next; None for no limit.
    zero_start
        Whether a residual of zero starts the limiter, as in the official code; then all later
        ones stay near zero. Otherwise the first that is not zero does.
    """

    def __init__(self, leak: float, limiter: float | None, zero_start: bool = False) -> None:
        self.leak = leak
        self.limiter = limiter
        self.zero_start = zero_start

    def expected(self, dtype: torch.dtype) -> Spec:
        """``residual_norm``: the limited norm of the last step, negative before the first."""
        return {} if self.limiter is None else {"residual_norm": ((), dtype)}

    def fill(self, state: State) -> None:
        """There is no last step."""
        if self.limiter is not None:
            state["residual_norm"].fill_(-1.0)

    def __call__(self, move: Move) -> None:
        """Change the weight."""
        space = cast(Projection, move.subspace)
        line = 1 if space.side == "right" else 0
        dtype = move.direction.dtype
        R, N = move.small.to(dtype), move.direction
        kept = _squares(R, line, dtype, move.scratch)
        phi = _squares(N, line, dtype, move.scratch).sqrt_() / (kept.sqrt() + 1e-8)
        factor = phi
        if self.limiter is not None:
            factor = phi / self._limited(move, space, phi, R, kept)
        N = N.mul_(move.scale).addcmul_(R, factor.unsqueeze(line), value=-self.leak)
        size = move.size
        if isinstance(size, Tensor):
            factor, N, size = factor * size, N.mul_(size), 1.0
        if move.before != 1.0:
            move.weight.mul_(move.before)
        wide = factor.to(move.weight.dtype).unsqueeze(line)
        move.weight.addcmul_(move.grad, wide, value=-size)
        space.up(N, out=move.weight, alpha=-size * move.after, beta=move.after)

    def _limited(
        self, move: Move, space: Projection, phi: Tensor, R: Tensor, kept: Tensor
    ) -> Tensor:
        assert self.limiter is not None
        c = self.leak
        # ||G_i - c up(R)_i||^2, where <G_i, up(R)_i> is ||R_i||^2.
        line = 1 if space.side == "right" else 0
        total = _squares(move.grad, line, R.dtype, move.scratch)
        total.add_(kept, alpha=-2.0 * c).add_(space.line_norms(R, kept), alpha=c * c)
        norm = total.clamp_min_(0.0).mul_(phi.square()).sum().sqrt()
        last = move.state["residual_norm"]
        growth = (norm / (last + 1e-8)).clamp_min(self.limiter) / self.limiter
        started = last >= 0.0 if self.zero_start else last > 0.0
        limit = torch.where(started, growth, torch.ones_like(growth))
        move.put(last, norm / limit)
        return limit


def _squares(
    matrix: Tensor, dim: int, dtype: torch.dtype, scratch: Callable[[Tensor], Tensor]
) -> Tensor:
    """Squared norms along a dimension, summed in ``dtype``."""
    if dim == 1:
        norms: Tensor = torch.linalg.vector_norm(matrix, dim=1, dtype=dtype)
        return norms.square_()
    # On a CPU the norm of columns takes ten times as long as this.
    wide = matrix if matrix.dtype == dtype else matrix.to(dtype)
    return torch.mul(wide, wide, out=scratch(wide)).sum(0)


def scaled_side(side: Side) -> None:
    """Only a projection of one side leaves lines that can be scaled.

    >>> scaled_side("full")
    Traceback (most recent call last):
        ...
    fullrank.core.errors.InputError: proj_type='full' leaves no line of the residual to scale...
    """
    if side == "full":
        raise InputError(
            "proj_type='full' leaves no line of the residual to scale; project one side"
        )
