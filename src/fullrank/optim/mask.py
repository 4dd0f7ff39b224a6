"""LIFT's principal weights: the largest entries after rank reduction (arXiv 2506.00772)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.linalg.checks import Seed, check_matrix, double, working
from fullrank.linalg.svd import randomized_svd
from fullrank.optim import checks as valid
from fullrank.optim.foundation import Spec
from fullrank.optim.subspace import MomentPolicy

SVDKind = Literal["full", "randomized"]


@torch.no_grad()
def principal_mask(
    W: Tensor,
    rank: int,
    lra_rank: int,
    largest: bool = True,
    block: int | tuple[int, int] | None = None,
    *,
    svd: SVDKind = "full",
    generator: Seed = None,
) -> Tensor:
    """Choose the entries that matter most in the best rank-R approximation of a weight.

    ``W' = U_R S_R V_R^T``; the mask is True at the k largest ``|W'_ij|`` of the whole matrix,
    ``k = min(r (m + n), m n)`` as many as a rank-r LoRA has parameters. Of equal entries those
    with the lowest flat index are taken.

    Parameters
    ----------
    W
        ``(m, n)``, any floating-point dtype and strides.
    rank
        r, which sets the budget; at least 1.
    lra_rank
        R in ``[1, min(m, n)]``, which sets the filter.
    largest
        False takes the k smallest, as the released code did with its published settings (it
        chose by the word "largest" in an option that the scripts never gave).
    block
        Choose blocks of that many rows and columns by the sum of their ``|W'_ij|``: as many
        whole blocks as the budget holds, one at least. Blocks at the edges may be cut off.
    svd
        ``"full"``: exact. ``"randomized"``: a sketch of ``min(2 R, min(m, n))`` columns with two
        power iterations; entries near the k-th place may differ.
    generator
        For the sketch: a ``torch.Generator``, a seed, or None for the global generator.

    Returns
    -------
    Tensor
        ``(m, n)`` bool, on the weight's device.

    Raises
    ------
    InputError
        On a weight that is no finite real matrix, or values out of range.

    Examples
    --------
    >>> W = torch.outer(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([-3.0, 2.0, 1.0]))
    >>> principal_mask(W, rank=1, lra_rank=1).int()
    tensor([[1, 1, 1],
            [1, 1, 0],
            [1, 0, 0]], dtype=torch.int32)
    """
    check_mask(tuple(W.shape), rank, lra_rank)
    score = principal_part(W, lra_rank, svd=svd, generator=generator).abs_()
    if block is None:
        chosen = leading_indices(score.flatten(), budget(tuple(W.shape), rank), largest)
        mask = torch.zeros(W.numel(), dtype=torch.bool, device=W.device)
        return mask.index_fill_(0, chosen, True).view(W.shape)
    return _block_mask(score, rank, largest, block)


def budget(shape: Sequence[int], rank: int) -> int:
    """Return how many entries of an ``(m, n)`` matrix are trained: ``min(r (m + n), m n)``.

    >>> budget((10, 20), 3), budget((10, 20), 100)
    (90, 200)
    """
    m, n = shape
    return min(rank * (m + n), m * n)


def check_mask(shape: Sequence[int], rank: int, lra_rank: int) -> None:
    """Raise :class:`InputError` unless a matrix of this shape can be masked so."""
    if len(shape) != 2:
        raise InputError(
            f"a mask needs a matrix; this weight has shape {tuple(shape)}. Leave it in a group "
            "without rank, or reshape it to (out, rest)"
        )
    for name, value in (("rank", rank), ("lra_rank", lra_rank)):
        valid.whole(name, value)
    if lra_rank > min(shape):
        raise InputError(
            f"lra_rank={lra_rank} for a weight {tuple(shape)}; it can be {min(shape)} at most"
        )


@torch.no_grad()
def principal_part(
    W: Tensor, rank: int, *, svd: SVDKind = "full", generator: Seed = None
) -> Tensor:
    """Return the best rank-R approximation of an ``(m, n)`` weight, in float32 at least.

    Exactly (``svd="full"``) it is the projection on the leading eigenvectors of the smaller Gram
    matrix, worked out in float64: a fraction of an SVD's time. Singular values below 1e-8 of the
    largest are lost in it; their part of the result is smaller than float32 resolves.

    >>> principal_part(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2).diagonal().tolist()
    [3.0, 2.0, 0.0]
    """
    try:
        check_matrix(W, "weight")
    except ValueError as error:
        raise InputError(f"no mask can be made: {error}") from error
    work = working(W)
    if svd == "randomized":
        # As many columns as the official code's sketch has.
        oversample = min(rank, min(W.shape) - rank)
        found = randomized_svd(work, rank, oversample=oversample, generator=generator)
        return found.matrix()
    if svd != "full":
        raise InputError(f"svd={svd!r}; it is 'full' or 'randomized'")
    if rank == min(W.shape):
        return work.clone()
    wide = double(work)
    tall = wide.shape[0] >= wide.shape[1]
    _, vectors = torch.linalg.eigh(wide.mT @ wide if tall else wide @ wide.mT)
    basis = vectors[:, -rank:].to(work)
    part: Tensor = (work @ basis) @ basis.mT if tall else basis @ (basis.mT @ work)
    return part


def leading_indices(score: Tensor, k: int, largest: bool = True) -> Tensor:
    """Flat indices of the k largest (or smallest) scores, ascending; ties by lowest index.

    >>> leading_indices(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2).tolist()
    [1, 2]
    """
    if k == score.numel():
        return torch.arange(k, device=score.device)
    limit = score.kthvalue(score.numel() - k + 1 if largest else k).values
    inside = score > limit if largest else score < limit
    ties = (score == limit).nonzero().squeeze(1)
    inside[ties[: k - int(inside.sum())]] = True
    return inside.nonzero().squeeze(1)


def _block_mask(score: Tensor, rank: int, largest: bool, block: int | tuple[int, int]) -> Tensor:
    height, width = (block, block) if isinstance(block, int) else block
    if not all(isinstance(side, int) and side >= 1 for side in (height, width)):
        raise InputError(f"block={block!r}; it is a number of rows and columns, or a pair of them")
    m, n = score.shape
    rows, columns = -(-m // height), -(-n // width)
    padded = torch.nn.functional.pad(score, (0, columns * width - n, 0, rows * height - m))
    sums = padded.view(rows, height, columns, width).sum(dim=(1, 3))
    count = min(max(budget((m, n), rank) // (height * width), 1), sums.numel())
    chosen = leading_indices(sums.flatten(), count, largest)
    mask = torch.zeros(sums.numel(), dtype=torch.bool, device=score.device)
    grid = mask.index_fill_(0, chosen, True).view(rows, columns)
    whole = grid.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return whole[:m, :n].contiguous()


class PrincipalMask:
    """The subspace of a weight's principal entries: the small array is a vector of k of them.

    Unlike a projection it is chosen from the weight, not from the gradient.

    Parameters
    ----------
    rank, lra_rank
        r and R of :func:`principal_mask`.
    svd
        ``"full"`` or ``"randomized"``.
    indices
        ``(k,)`` flat indices in the order of the matrix, ascending; int32 while they fit.

    Examples
    --------
    >>> W = torch.diag(torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0]))
    >>> subspace = PrincipalMask(1, 1).fit(W, torch.ones(5, 5))
    >>> subspace.small_shape((5, 5)), subspace.down(W).max()
    ((10,), tensor(5.))
    """

    def __init__(
        self,
        rank: int,
        lra_rank: int,
        svd: SVDKind = "full",
        indices: Tensor | None = None,
    ) -> None:
        self.rank, self.lra_rank, self.svd, self.indices = rank, lra_rank, svd, indices

    @property
    def side(self) -> str:
        """``"mask"``."""
        return "mask"

    @property
    def draws(self) -> bool:
        """Whether a sketch is drawn."""
        return self.svd == "randomized"

    @property
    def entrywise(self) -> bool:
        """Yes: the small array consists of entries of the gradient."""
        return True

    @property
    def fitted(self) -> bool:
        """Whether there are indices."""
        return self.indices is not None

    @property
    def state(self) -> dict[str, Tensor]:
        """The indices."""
        return {} if self.indices is None else {"indices": self.indices}

    def expected(self, shape: tuple[int, int], dtype: torch.dtype) -> Spec:
        """Shape and dtype of the indices."""
        return {"indices": (self.small_shape(shape), index_dtype(shape[0] * shape[1]))}

    def small_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """``(k,)``."""
        return (budget(shape, self.rank),)

    def restore(self, state: dict[str, Tensor]) -> Self:
        """Return the mask of these indices."""
        return type(self)(self.rank, self.lra_rank, self.svd, state.get("indices"))

    def fit(self, weight: Tensor, grad: Tensor, generator: Seed = None) -> Self:
        """Choose the principal entries of the weight as it is now."""
        score = principal_part(weight, self.lra_rank, svd=self.svd, generator=generator).abs_()
        chosen = leading_indices(score.flatten(), budget(weight.shape, self.rank))
        return self.restore({"indices": chosen.to(index_dtype(weight.numel()))})

    def down(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Gather the entries of an ``(m, n)`` array."""
        assert self.indices is not None
        found = grad.reshape(-1).index_select(0, self.indices)
        return found if out is None else out.copy_(found)

    def up(
        self, small: Tensor, out: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
    ) -> Tensor:
        """Return ``out`` with ``beta * out + alpha * small`` at the mask's entries, in place.

        Others stay as they are, whatever ``beta``. ``out`` is required.
        """
        if out is None:
            raise InputError("a mask does not know its matrix's shape; give out=")
        self.put(out, self.down(out).mul_(beta).add_(small, alpha=alpha))
        return out

    def residual(self, grad: Tensor, small: Tensor, out: Tensor) -> Tensor:
        """Write ``G - up(small)`` to ``out``: G with ``small`` taken off the mask's entries."""
        out.copy_(grad)
        self.put(out, self.down(grad) - small)
        return out

    def put(self, matrix: Tensor, small: Tensor) -> None:
        """Write the entries of an ``(m, n)`` array; the others are not touched."""
        assert self.indices is not None
        flat = matrix.reshape(-1)
        # Of the ways to write at indices, by far the fastest on a CPU; it wants them long.
        flat.scatter_(0, self.indices.long(), small.to(matrix.dtype))
        if flat.data_ptr() != matrix.data_ptr():
            matrix.copy_(flat.view(matrix.shape))

    def transport(self, old: Self, moments: Sequence[Tensor], policy: MomentPolicy) -> None:
        """Carry vectors from the old mask, in place: kept entries keep theirs, new ones get 0.

        With policy ``"reset"`` all start at 0.
        """
        kept, place = self.overlap(old)
        for moment in moments:
            if policy == "reset":
                moment.zero_()
            else:
                moment.copy_(torch.where(kept, moment[place], 0.0))

    def align(self, old: Self) -> None:
        """Do nothing: a mask has no signs."""

    def inject(self, given: Sequence[Tensor], like: Tensor) -> Self:
        """Return the mask of the flat indices, or of the bool mask, that a caller chose."""
        (chosen,) = given
        if chosen.dtype == torch.bool and chosen.shape == like.shape:
            chosen = chosen.reshape(-1).nonzero().squeeze(1)
        indices = chosen.to(like.device, index_dtype(like.numel())).sort().values
        m, n = like.shape
        if indices.shape != self.small_shape((m, n)):
            raise InputError(
                f"{indices.numel()} entries were chosen of a matrix {(m, n)}; its budget is "
                f"{self.small_shape((m, n))[0]}"
            )
        return self.restore({"indices": indices})

    def overlap(self, old: Self) -> tuple[Tensor, Tensor]:
        """Which entries were in the old mask (``(k,)`` bool), and at which place of it."""
        assert self.indices is not None
        assert old.indices is not None
        place = torch.searchsorted(old.indices, self.indices).clamp_max(len(old.indices) - 1)
        return old.indices[place] == self.indices, place


def index_dtype(numel: int) -> torch.dtype:
    """int32 while flat indices fit into it."""
    return torch.int32 if numel < 2**31 else torch.int64
