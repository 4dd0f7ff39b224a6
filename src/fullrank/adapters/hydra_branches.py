"""Hydra's arithmetic: a parallel and a sequential low-rank branch, and what they fold into.

Beside LoRA's branch on a layer's input there is one on its output (arXiv 2309.06922)::

    h = W0 x + b0
    y = h + s branch_p(x) + s branch_s(h),    branch(z) = B (A z + a) + c

The sequential branch sees the bias ``b0``. Of the official code, only the vision part has ``s``
and the biases ``a`` and ``c``; the paper's formulas have neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fullrank.adapters.lora_files import LowRank
from fullrank.adapters.low_rank_add import add_low_rank
from fullrank.core.errors import InputError


@dataclass(frozen=True)
class Branch:
    """One low-rank branch.

    Attributes
    ----------
    A, B
        Down ``(r, in)`` and up ``(out, r)``.
    a, c
        Biases ``(r,)`` and ``(out,)`` after each, or None.
    """

    A: Tensor
    B: Tensor
    a: Tensor | None = None
    c: Tensor | None = None

    def down(self, z: Tensor) -> Tensor:
        """Return ``A z + a`` for ``z`` of shape ``(..., in)``."""
        wide = torch.promote_types(z.dtype, self.A.dtype)
        return F.linear(z.to(wide), self.A.to(wide), None if self.a is None else self.a.to(wide))

    def at_zero(self) -> Tensor | None:
        """What the biases alone put out, ``B a + c``; None when there are none."""
        if self.a is None:
            return self.c
        shifted = self.B @ self.a
        return shifted if self.c is None else shifted + self.c


def hydra_output(
    h: Tensor,
    x: Tensor,
    parallel: Branch | None,
    sequential: Branch | None,
    scale: float = 1.0,
    *,
    base: Tensor | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Add both branches to a layer's output.

    Parameters
    ----------
    h
        What they are added to, of shape ``(..., out)``.
    x
        The layer's input, of shape ``(..., in)``.
    parallel, sequential
        Branches on ``x`` and on the layer's output; None for none.
    scale
        ``s``.
    base
        Output ``W0 x + b0`` of the base layer, where other adapters were added to ``h`` already.
    dropout
        Applied between the down- and the up-projections.

    Examples
    --------
    >>> x, W0 = torch.ones(1, 3), torch.eye(3)
    >>> twice = Branch(torch.eye(3)[:1], torch.eye(3)[:, :1])
    >>> hydra_output(F.linear(x, W0), x, None, twice)
    tensor([[2., 1., 1.]])
    """
    seen = [(parallel, x), (sequential, h if base is None else base)]
    present = [(branch, z) for branch, z in seen if branch is not None]
    if not present:
        return h
    # Side by side, both branches are one product and one pass over the layer's output.
    z = _joined([branch.down(z) for branch, z in present])
    B = _joined([branch.B for branch, _ in present])
    y = add_low_rank(h, z if dropout is None else dropout(z), B, scale)
    for branch, _ in present:
        if branch.c is not None:
            y = y + (scale * branch.c).to(y.dtype)
    return y


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def hydra_lora(
    W0: Tensor,
    b0: Tensor | None,
    parallel: Branch | None,
    sequential: Branch | None,
    scale: float = 1.0,
) -> tuple[LowRank, Tensor | None]:
    """Return the LoRA and the change of the bias that do what both branches do.

    Parameters
    ----------
    W0, b0
        Weight ``(out, in)`` of the base layer as it was before any merge, and its bias.
    parallel, sequential
        The branches; at least one.
    scale
        ``s``.

    Returns
    -------
    LowRank
        ``A = [A_p; A_s W0]`` and ``B = s [B_p, B_s]``, in float32 or wider: ``W0 + B A`` is the
        merged weight. Its rank is the sum of both.
    Tensor or None
        What is added to the bias; None when nothing is.

    Raises
    ------
    InputError
        When there is no branch, or one does not fit the layer.

    Examples
    --------
    >>> branch = Branch(torch.ones(1, 2), torch.ones(4, 1))
    >>> update, shift = hydra_lora(torch.zeros(4, 2), None, branch, None)
    >>> tuple(update.A.shape), tuple(update.B.shape), shift
    ((1, 2), (4, 1), None)
    """
    if parallel is None and sequential is None:
        raise InputError("Hydra without a branch changes nothing; give one of them a rank")
    out_features, in_features = W0.shape
    _check("parallel", parallel, in_features, out_features)
    _check("sequential", sequential, out_features, out_features)
    # A_s W0 multiplies two rounded matrices; in half precision the merge would lose what it adds.
    wide = torch.promote_types(W0.dtype, torch.float32)
    downs, ups, shifts = [], [], []
    if parallel is not None:
        downs.append(parallel.A.to(wide))
        ups.append(parallel.B.to(wide))
        shifts.append(parallel.at_zero())
    if sequential is not None:
        downs.append(sequential.A.to(wide) @ W0.to(wide))
        ups.append(sequential.B.to(wide))
        shifts.append(sequential.at_zero())
        if b0 is not None:
            shifts.append(sequential.B.to(wide) @ (sequential.A.to(wide) @ b0.to(wide)))
    found = [shift.to(wide) for shift in shifts if shift is not None]
    shift = scale * torch.stack(found).sum(0) if found else None
    return LowRank(torch.cat(downs), scale * torch.cat(ups, dim=1)), shift


def _check(name: str, branch: Branch | None, width_in: int, width_out: int) -> None:
    if branch is None:
        return
    r = branch.A.shape[0]
    if branch.A.shape != (r, width_in) or branch.B.shape != (width_out, r):
        raise InputError(
            f"the {name} branch has A {tuple(branch.A.shape)} and B {tuple(branch.B.shape)}; "
            f"this layer needs (r, {width_in}) and ({width_out}, r)"
        )
