"""Running inverses of Kronecker factors under rank-1 updates (MKOR, arXiv 2306.01685).

One update is ``J <- s J - w w^T + e I``; a rule says what s, w and e are for a statistic v. Under
the official rule s + e = 1, so that J is always the identity less a sum of outer products, whose
weights shrink geometrically: ``J = I - sum_k c_k w_k w_k^T``. :class:`Columns` keeps the w, which
costs less memory and time than the matrix as long as they are fewer than half its side; older
ones fall below the rounding of the dtype. :class:`Dense` keeps the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from fullrank.core.errors import InputError

Rule = Literal["official", "ema"]

# Below this side one dense product is faster than two thin ones.
_SMALL = 64
# Columns are added to a buffer that grows by this factor.
_GROWTH = 1.5


def _wide(tensor: Tensor) -> Tensor:
    """Half-precision factors are stored; the arithmetic is in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rank_one(Jv: Tensor, v: Tensor, rule: Rule, blend: float) -> tuple[float, Tensor, float]:
    """Return s, w, e of the update ``s J - w w^T + e I`` by a statistic v.

    ``official``: ``(Jh^-1 + v v^T)^-1`` with ``Jh = blend J + (1 - blend) I``; eigenvalues stay in
    (0, 1]. ``ema``: ``(blend J^-1 + (1 - blend) v v^T)^-1``; directions that v does not visit grow
    like ``blend^-t``.
    """
    if rule == "official":
        u = blend * Jv + (1.0 - blend) * v
        return blend, u / (1.0 + torch.dot(v, u)).sqrt(), 1.0 - blend
    size = (1.0 - blend) / (blend * (blend + (1.0 - blend) * torch.dot(v, Jv)))
    return 1.0 / blend, Jv * size.sqrt(), 0.0


def sm_update(J: Tensor, v: Tensor, rule: Rule = "official", blend: float = 0.95) -> Tensor:
    """Update an inverse factor by a rank-1 statistic, after Sherman and Morrison.

    Parameters
    ----------
    J
        ``(d, d)``, symmetric positive definite; not changed.
    v
        ``(d,)``, or ``(d, 1)``.
    rule
        ``"official"`` (default): ``(Jh^-1 + v v^T)^-1`` with ``Jh = blend J + (1 - blend) I``,
        what the official code computes. ``"ema"``: ``(blend J^-1 + (1 - blend) v v^T)^-1``, the
        inverse of the moving average that the paper describes. The formula printed in the paper
        is neither: it adds where these subtract, and is no inverse of anything.
    blend
        0.95 (a literal in the official code); gamma in the paper.

    Returns
    -------
    Tensor
        ``(d, d)``, symmetric positive definite, of J's dtype; half precision computes in float32.

    Raises
    ------
    InputError
        On shapes that do not fit, an unknown rule, a blend outside (0, 1].

    Examples
    --------
    >>> sm_update(torch.eye(2), torch.tensor([1.0, 2.0]))
    tensor([[ 0.8333, -0.3333],
            [-0.3333,  0.3333]])
    """
    check_rule(rule, blend)
    if J.dim() != 2 or J.shape[0] != J.shape[1] or v.numel() != J.shape[0] or v.dim() > 2:
        raise InputError(
            f"J of shape {tuple(J.shape)} and v of shape {tuple(v.shape)}; expected (d, d) and (d,)"
        )
    wide = _wide(J)
    vector = v.reshape(-1).to(wide.dtype)
    s, w, e = rank_one(wide @ vector, vector, rule, blend)
    new = torch.addr(wide * s, w, w, alpha=-1)
    new.diagonal().add_(e)
    return new.to(J.dtype)


def check_rule(rule: str, blend: float) -> None:
    """Raise :class:`InputError` on a rule that is none, or a blend that keeps nothing."""
    if rule not in get_args(Rule):
        raise InputError(f"rule={rule!r}; it is one of {', '.join(map(repr, get_args(Rule)))}")
    if not isinstance(blend, int | float) or not 0 < blend <= 1:
        raise InputError(f"blend={blend!r}; it must lie in (0, 1]")


class Factor(Protocol):
    """A symmetric matrix J with the few operations that MKOR needs."""

    @property
    def state(self) -> dict[str, Tensor]:
        """What defines J, as plain tensors."""
        ...

    def matrix(self) -> Tensor:
        """J itself, ``(d, d)``, in float32 at least."""
        ...

    def times(self, v: Tensor) -> Tensor:
        """``J v``."""
        ...

    def change(self, s: Tensor, w: Tensor, e: Tensor) -> Factor:
        """``s J - w w^T + e I``, in place where possible; s and e are 0-d."""
        ...

    def left(self, G: Tensor) -> Tensor:
        """``J G``."""
        ...

    def right(self, G: Tensor) -> Tensor:
        """``G J``."""
        ...


class Dense:
    """The matrix itself."""

    def __init__(self, J: Tensor) -> None:
        self.J = J

    @property
    def state(self) -> dict[str, Tensor]:
        """``inverse``: (d, d)."""
        return {"inverse": self.J}

    def matrix(self) -> Tensor:
        """J in float32 at least."""
        return _wide(self.J)

    def times(self, v: Tensor) -> Tensor:
        """``J v``."""
        return _wide(self.J) @ v

    def change(self, s: Tensor, w: Tensor, e: Tensor) -> Dense:
        """Two passes over the matrix."""
        J = _wide(self.J)
        J.mul_(s).addr_(w, w, alpha=-1)
        J.diagonal().add_(e)
        if J is not self.J:
            self.J.copy_(J)
        return self

    def left(self, G: Tensor) -> Tensor:
        """``J G``."""
        return self.J.to(G.dtype) @ G

    def right(self, G: Tensor) -> Tensor:
        """``G J``."""
        return G @ self.J.to(G.dtype)


class Columns:
    """The identity less weighted outer products: ``I - sum_k c_k w_k w_k^T``.

    Exact as long as every update keeps the identity's weight (s + e = 1), up to the ``most``-th
    newest product: the sum of the weights of all older ones is below the dtype's rounding.

    Parameters
    ----------
    dim
        d.
    most
        How many products are kept.
    dtype, device
        Of the stored w.
    """

    def __init__(self, dim: int, most: int, dtype: torch.dtype, device: torch.device) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self.most = most
        self.next = 0
        self.count = 0
        self._w = torch.empty(0, dim, dtype=dtype, device=device)
        self._c = torch.empty(0, dtype=wide, device=device)

    @property
    def w(self) -> Tensor:
        """``(count, d)``."""
        return self._w[: self.count]

    @property
    def c(self) -> Tensor:
        """``(count,)``."""
        return self._c[: self.count]

    @property
    def state(self) -> dict[str, Tensor]:
        """``columns`` (count, d), ``weights`` (count,), ``next`` (which is overwritten next)."""
        return {"columns": self.w, "weights": self.c, "next": torch.tensor(self.next)}

    def restore(self, columns: Tensor, weights: Tensor, next_: int) -> None:
        """Take the products from a saved state."""
        self._w = columns.to(self._w, copy=True).contiguous()
        self._c = weights.to(self._c, copy=True)
        self.count, self.next = len(columns), next_

    def matrix(self) -> Tensor:
        """J in float32 at least."""
        w = _wide(self.w)
        return torch.eye(w.shape[1], dtype=w.dtype, device=w.device) - w.t() @ (
            self.c.unsqueeze(1) * w
        )

    def times(self, v: Tensor) -> Tensor:
        """``J v``."""
        w = _wide(self.w)
        return v - w.t() @ (self.c * (w @ v))

    def change(self, s: Tensor, w: Tensor, e: Tensor) -> Columns:
        """Scale the weights, and add a product or let it replace the oldest."""
        self._c.mul_(s)
        if self.count < self.most:
            self._grow()
            self.count += 1
        self._w[self.next] = w.to(self._w.dtype)
        self._c[self.next] = 1.0
        self.next = (self.next + 1) % self.most
        return self

    def _grow(self) -> None:
        if self.count < len(self._w):
            return
        room = min(self.most, max(8, int(_GROWTH * self.count)))
        for name in ("_w", "_c"):
            old = getattr(self, name)
            new = old.new_zeros(room, *old.shape[1:])
            new[: self.count] = old
            setattr(self, name, new)

    def left(self, G: Tensor) -> Tensor:
        """``J G``, two thin products."""
        w = self.w.to(G.dtype)
        return torch.addmm(G, w.t(), self.c.to(G.dtype).unsqueeze(1) * (w @ G), alpha=-1)

    def right(self, G: Tensor) -> Tensor:
        """``G J``, two thin products."""
        w = self.w.to(G.dtype)
        return torch.addmm(G, (G @ w.t()) * self.c.to(G.dtype), w, alpha=-1)


def products_that_count(blend: float, dtype: torch.dtype) -> float:
    """After how many official updates a product's remains are below the dtype's rounding.

    Each ``w w^T`` is at most the identity, so what is dropped after k updates is at most
    ``blend^k / (1 - blend)``.

    >>> products_that_count(0.95, torch.float32), products_that_count(1.0, torch.float32)
    (370, inf)
    """
    if blend == 1.0:
        return math.inf
    rounding = torch.finfo(dtype).eps
    return math.ceil(math.log(rounding * (1.0 - blend)) / math.log(blend))


class InverseFactor:
    """One running inverse, in the form that costs least.

    Parameters
    ----------
    dim
        d.
    rule, blend
        See :func:`sm_update`.
    dtype, device
        Of what is stored.
    dense
        Keep the matrix from the start.
    """

    def __init__(
        self,
        dim: int,
        rule: Rule,
        blend: float,
        dtype: torch.dtype,
        device: torch.device,
        dense: bool = False,
    ) -> None:
        self.dim, self.rule, self.blend = dim, rule, blend
        self.dtype, self.device = dtype, device
        self._limit = dim // 2
        self._may_be_thin = rule == "official" and dim > _SMALL and not dense
        self.form: Factor
        if self._may_be_thin:
            self.form = self._columns()
        else:
            self.form = Dense(torch.eye(dim, dtype=dtype, device=device))

    def _columns(self) -> Columns:
        most = products_that_count(self.blend, self.wide)
        # One more than pays: then the matrix takes over.
        return Columns(self.dim, int(min(most, self._limit + 1)), self.dtype, self.device)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def trivial(self) -> bool:
        """Whether this is known to be the identity still."""
        return isinstance(self.form, Columns) and self.form.count == 0

    def update(self, v: Tensor, use: Tensor, pull: Tensor, zeta: float) -> None:
        """Take in a statistic, or pull the factor to the identity.

        Parameters
        ----------
        v
            ``(d,)`` in float32 at least.
        use
            0-d bool on the device: False leaves the factor as it is.
        pull
            0-d bool: ``zeta J + (1 - zeta) I`` in place of the update.
        zeta
            In [0, 1].
        """
        v = torch.where(use, v, torch.zeros_like(v))
        s, w, e = rank_one(self.form.times(v), v, self.rule, self.blend)
        one, zero = v.new_ones(()), v.new_zeros(())
        kept = torch.where(pull, one * zeta, torch.where(use, one * s, one))
        added = torch.where(pull, one * (1.0 - zeta), torch.where(use, one * e, zero))
        taken = use & ~pull
        self.form = self.form.change(kept, torch.where(taken, w, torch.zeros_like(w)), added)
        if isinstance(self.form, Columns) and self.form.count > self._limit:
            self.form = Dense(self.form.matrix().to(self.dtype))

    @property
    def most_bytes(self) -> int:
        """What this takes once it has had many updates; also of one on no device."""
        if isinstance(self.form, Columns) and self.form.most <= self._limit:
            product = self.dim * self.dtype.itemsize + self.wide.itemsize
            return self.form.most * product + torch.int64.itemsize
        return self.dim * self.dim * self.dtype.itemsize

    def largest(self) -> Tensor:
        """``max |J|``, 0-d."""
        return self.form.matrix().abs().amax()

    def load(self, state: Mapping[str, Tensor], name: str) -> None:
        """Take the form and the numbers of a saved state.

        Raises
        ------
        InputError
            When they are of another layer, or another rule.
        """
        if set(state) == {"inverse"} and tuple(state["inverse"].shape) == (self.dim, self.dim):
            self.form = Dense(state["inverse"].to(self.device, self.dtype, copy=True))
            return
        if (
            set(state) == {"columns", "weights", "next"}
            and self._may_be_thin
            and state["columns"].dim() == 2
            and state["columns"].shape[1] == self.dim
            and tuple(state["weights"].shape) == (len(state["columns"]),)
        ):
            form = self._columns()
            if len(state["columns"]) <= form.most:
                form.restore(state["columns"], state["weights"], int(state["next"]))
                self.form = form
                return
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        raise InputError(
            f"the saved factor of {name} is {shapes}, expected one of side {self.dim} for rule "
            f"{self.rule!r}: the model or the optimizer's arguments have changed since then"
        )
