"""Factor solvers: from a weight, and what flows through it, to two thin factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fullrank.compress.calibration import LayerStats
from fullrank.compress.data_checks import nothing_to_go_by
from fullrank.compress.layers import LowRankLinear
from fullrank.compress.semi_nmf import semi_nmf
from fullrank.core.errors import InputError
from fullrank.linalg.checks import all_finite
from fullrank.linalg.gram_svd import gram_svd

Method = Literal["svd", "output_pca", "gauss_newton", "snmf", "random"]
Balance = Literal["sqrt", "first", "second", "orthonormal_second"]

# Added to a covariance, relative to its mean variance, so that directions the calibration data
# never showed are ranked by the weights and not by rounding.
_NULL_RIDGE = 1e-13
# Damping of the Gauss-Newton metric, relative to its mean: directions whose gradients were
# small on the calibration data are not free.
_DAMPING = 1e-2


@dataclass(frozen=True)
class Factors:
    """Two factors of an ``(m, n)`` matrix.

    Attributes
    ----------
    first
        ``(r, n)``.
    second
        ``(m, r)``.
    bias_shift
        ``(m,)`` to add to the layer's bias, or None where the method leaves the bias alone.
    error
        Relative squared error: of the layer's outputs on the calibration data (against their
        variance) where there are statistics, else of the weight.
    """

    first: Tensor
    second: Tensor
    bias_shift: Tensor | None
    error: float


@dataclass(frozen=True)
class Decomposition:
    """Components of a matrix in order of importance; any prefix of them is a solution.

    Attributes
    ----------
    left, right
        ``(m, k)`` and ``(k, n)``; ``left @ right`` is the matrix at full k.
    reader
        ``(k, m)``, where ``right = reader @ weight``; None where the solver has no such form.
    loss
        ``(k,)``, descending: what the method's criterion loses when component i is dropped.
    """

    left: Tensor
    right: Tensor
    reader: Tensor | None
    loss: Tensor
    weight: Tensor
    stats: LayerStats | None
    shifts_bias: bool

    def truncate(self, rank: int, balance: Balance = "orthonormal_second") -> Factors:
        """Return the factors of the first ``rank`` components, in float64.

        Raises
        ------
        InputError
            When the rank is not in ``[1, min(m, n)]`` or the balance is unknown.
        """
        _check_rank(rank, self.weight)
        shift, error = self._shift_and_error(rank)
        first, second = _balanced(self.right[:rank], self.left[:, :rank], balance)
        return Factors(first, second, shift, error)

    def _shift_and_error(self, rank: int) -> tuple[Tensor | None, float]:
        W, stats = self.weight, self.stats
        left = self.left[:, :rank]
        if stats is None:
            return None, _relative_error(W, left @ self.right[:rank])
        # `lost` maps what the statistics are of (x, or W x) to the error of the output.
        if stats.side == "input":
            lost = W - left @ self.right[:rank]
        else:
            assert self.reader is not None
            lost = torch.eye(len(W)).to(W) - left @ self.reader[:rank]
        mean = lost @ stats.moments.mean.to(W)
        error = ((lost @ stats.moments.covariance.to(W)) * lost).sum()
        if not self.shifts_bias:
            error = error + mean.square().sum()
        scale = stats.output_covariance(W).diagonal().sum().to(W)
        scale = scale.clamp_min(torch.finfo(W.dtype).tiny)
        return mean if self.shifts_bias else None, float((error / scale).clamp_min(0))


def decompose(
    weight: Tensor, method: Method = "svd", stats: LayerStats | None = None
) -> Decomposition:
    """Order the components of a matrix by what dropping them costs.

    Parameters
    ----------
    weight
        ``(m, n)``, any float dtype, not necessarily contiguous. Work is done in float64.
    method
        ``"svd"``: squared error of the weight. ``"output_pca"``: mean squared error of the
        layer's outputs on calibration data, the minimum over all affine maps of that rank
        (feature PCA; card LoRD, from Yu & Wu 2023). ``"gauss_newton"``: the same weighted by how
        strongly the model's output reacts to each direction, both sides taken as independent
        (the Kronecker-factored Gauss-Newton matrix); our own combination.
    stats
        What the last two need; gradients as well for ``"gauss_newton"``.

    Raises
    ------
    InputError
        On a weight that is empty, not finite or no matrix, on an unknown method, or when the
        statistics it needs are absent, of another shape, or of a constant.
    """
    if method in ("snmf", "random"):
        raise InputError(f"components of {method!r} have no order: use split, once for each rank")
    _check(weight, method, stats)
    W = weight.detach().to(dtype=torch.float64)
    if method == "svd" or stats is None:
        return Decomposition(*_svd(W), W, stats, shifts_bias=False)
    solve = _output_pca if method == "output_pca" else _gauss_newton
    return Decomposition(*solve(W, stats), W, stats, shifts_bias=True)


def split(
    weight: Tensor,
    rank: int,
    method: Method = "svd",
    balance: Balance | None = None,
    stats: LayerStats | None = None,
) -> Factors:
    """Factor a matrix at one rank.

    Parameters
    ----------
    weight, method, stats
        See :func:`decompose`; or ``"snmf"``, :func:`~fullrank.compress.semi_nmf` of the
        transposed weight, whose ``second`` holds no negative number; or ``"random"``, new factors
        that take only the weight's shape, as :class:`~fullrank.compress.LowRankLinear` draws them.
    rank
        Rank r in ``[1, min(m, n)]``.
    balance
        Where the scale of each component goes: ``"first"``, ``"second"``, ``"sqrt"`` (equal
        norms) or ``"orthonormal_second"`` (the solver's own form, scale in ``first``). By
        default ``"sqrt"`` for ``"svd"`` and ``"gauss_newton"``, ``"orthonormal_second"`` for
        the others. The product is the same.

    Examples
    --------
    >>> W = torch.outer(torch.arange(4.0), torch.arange(5.0))
    >>> factors = split(W, rank=1)
    >>> torch.allclose(factors.second @ factors.first, W.double())
    True
    """
    if balance is None:
        balance = default_balance(method)
    if method == "snmf":
        return _semi_nmf(weight, rank, balance)
    if method == "random":
        return _random(weight, rank, balance)
    if method == "svd" and stats is None:
        _check(weight, method, stats)
        return svd_factors(weight.double(), rank, balance)
    return decompose(weight, method, stats).truncate(rank, balance)


def svd_factors(weight: Tensor, rank: int, balance: Balance) -> Factors:
    """Factor a matrix by its leading singular components, in a precision fit for its dtype.

    Several times cheaper than all components in order, which :func:`decompose` finds. Of large
    matrices in float32 the error is within a thousandth of the least one, not to the last digit.
    """
    _check(weight, "svd", None)
    _check_rank(rank, weight)
    orthonormal = balance in ("first", "orthonormal_second")
    (U, S, Vh), lost = gram_svd(weight, rank, orthonormal=orthonormal)
    first, second = _balanced(S[:, None] * Vh, U, balance)
    return Factors(first, second, None, lost)


def _semi_nmf(weight: Tensor, rank: int, balance: Balance) -> Factors:
    _check(weight, "snmf", None)
    W = weight.detach().to(torch.float64)
    F, H = semi_nmf(W.T, rank)
    first, second = _balanced(F.T, H.T, balance)
    return Factors(first, second, None, _relative_error(W, second @ first))


def _random(weight: Tensor, rank: int, balance: Balance) -> Factors:
    _check(weight, "random", None)
    _check_rank(rank, weight)
    W = weight.detach().to(torch.float64)
    m, n = W.shape
    # What a factorised layer starts from when it is trained from scratch.
    drawn = LowRankLinear(n, m, rank, bias=False, device=W.device, dtype=W.dtype)
    first, second = _balanced(drawn.first.detach(), drawn.second.detach(), balance)
    return Factors(first, second, None, _relative_error(W, second @ first))


def _relative_error(W: Tensor, product: Tensor) -> float:
    # A weight of zero is met by factors of zero.
    lost, size = (W - product).square().sum(), W.square().sum()
    return float(lost / size.clamp_min(torch.finfo(W.dtype).tiny))


def default_balance(method: str) -> Balance:
    """Balance a method uses unless told otherwise."""
    return "sqrt" if method in ("svd", "gauss_newton") else "orthonormal_second"


def _check(weight: Tensor, method: str, stats: LayerStats | None) -> None:
    if method not in get_args(Method):
        raise InputError(f"method {method!r}; it is one of {', '.join(get_args(Method))}")
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise InputError(f"factors are made of a float matrix, not {tuple(weight.shape)}")
    if not all_finite(weight):
        raise InputError("the weight holds NaN or infinite values")
    if stats is not None:
        wide = weight.shape[1] if stats.side == "input" else weight.shape[0]
        if stats.moments.width != wide:
            raise InputError(
                f"the statistics are {stats.moments.width} wide on the {stats.side} side, the "
                f"weight is {tuple(weight.shape)}: they are of another layer"
            )
    if method in ("svd", "snmf", "random"):
        return
    if stats is None:
        raise InputError(f"method {method!r} needs calibration data")
    if stats.count == 0:
        raise InputError("the layer saw no calibration data")
    if why := nothing_to_go_by(stats, method):
        raise InputError(why)
    if method == "gauss_newton" and (stats.reaction is None or not stats.reaction.gradient.count):
        raise InputError("method 'gauss_newton' needs statistics collected with gradients=True")


def _check_rank(rank: int, weight: Tensor) -> None:
    if not 1 <= rank <= min(weight.shape):
        raise InputError(
            f"rank {rank} for a matrix {tuple(weight.shape)}; it must lie in "
            f"[1, {min(weight.shape)}]"
        )


def _balanced(first: Tensor, second: Tensor, balance: str) -> tuple[Tensor, Tensor]:
    if balance not in get_args(Balance):
        raise InputError(f"balance {balance!r}; it is one of {', '.join(get_args(Balance))}")
    if balance == "orthonormal_second":
        return first, second
    a, b = first.norm(dim=1), second.norm(dim=0)
    # A component of no weight has no scale to share.
    live = (a > 0) & (b > 0)
    one = torch.ones_like(a)
    goal = {"sqrt": (a / b).sqrt(), "first": 1 / b, "second": a}[balance]
    scale = torch.where(live, goal, one)
    return first / scale[:, None], second * scale


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in descending order, not negative, and eigenvectors."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _root(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a positive matrix, and its inverse."""
    values, vectors = _eigh(symmetric)
    root = values.clamp_min(1e-18 * values[0]).sqrt()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _ridged(symmetric: Tensor, share: float, direction: Tensor | None = None) -> Tensor:
    """Add ``share`` of the matrix's mean eigenvalue, along the identity or another matrix."""
    along = torch.eye(len(symmetric)).to(symmetric) if direction is None else direction
    return symmetric + share * symmetric.diagonal().sum() / along.diagonal().sum() * along


Solution = tuple[Tensor, Tensor, Tensor | None, Tensor]


def _svd(W: Tensor) -> Solution:
    # By way of the smaller Gram matrix: several times cheaper than an SVD, and the product is
    # exact at full rank, since one factor is orthonormal and the other a projection of W.
    m, n = W.shape
    if m <= n:
        values, U = _eigh(W @ W.T)
        return U, U.T @ W, U.T, values
    values, V = _eigh(W.T @ W)
    norms = values.sqrt()
    norms = norms.clamp_min(1e-14 * norms[0]).clamp_min(torch.finfo(W.dtype).tiny)
    U = (W @ V) / norms
    return U, norms[:, None] * V.T, U.T, values


def _output_pca(W: Tensor, stats: LayerStats) -> Solution:
    m, n = W.shape
    covariance = stats.moments.covariance.to(W)
    if stats.side == "input" and n < m:
        # The m x m covariance has rank n: solve in n dimensions and map back.
        root, _ = _root(_ridged(covariance, _NULL_RIDGE))
        M = W @ root
        values, V = _eigh(M.T @ M)
        U = torch.linalg.qr(M @ V).Q
    else:
        C = W @ covariance @ W.T if stats.side == "input" else covariance
        values, U = _eigh(_ridged(C, _NULL_RIDGE, W @ W.T))
    return U, U.T @ W, U.T, values


def _gauss_newton(W: Tensor, stats: LayerStats) -> Solution:
    # On the output side the metric is that of W x; on the input side that of x, in which an
    # error of the output is seen through W: the gradient is W^T g, the damping W^T W.
    G, C = _metric(stats, W)
    if stats.side == "output":
        root, inverse = _root(_ridged(G, _DAMPING))
        values, U = _eigh(root @ _ridged(C, _NULL_RIDGE, W @ W.T) @ root)
        reader = U.T @ root
        return inverse @ U, reader @ W, reader, values
    root, inverse = _root(_ridged(C, _NULL_RIDGE))
    values, V = _eigh(root @ _ridged(G, _DAMPING, W.T @ W) @ root)
    return W @ root @ V, V.T @ inverse, None, values


def _shrunk(moment: Tensor, target: Tensor, count: int) -> Tensor:
    """Pull a moment of few samples towards the shape of a well-known one.

    The weight of the target is that of a prior worth as many samples as there are dimensions.
    """
    weight = len(moment) / (len(moment) + count)
    trace = moment.diagonal().sum() / target.diagonal().sum().clamp_min(1e-300)
    return (1 - weight) * moment + weight * trace * target


def _metric(stats: LayerStats, W: Tensor) -> tuple[Tensor, Tensor]:
    """G and C, such that an error D of the layer costs about ``tr(G D C D^T)`` a sequence.

    What a sequence's tokens share and what sets them apart cost differently:
    ``tr(G_s D C_s D^T) + T tr(G_t D C_t D^T)`` with T tokens a sequence, G_s from gradients summed
    over sequences and C_s from their means. The best single pair in place of the two is the
    leading singular pair of the sum of their outer products (Van Loan and Pitsianis 1993).
    """
    assert stats.reaction is not None
    reaction = stats.reaction
    length = reaction.gradient.count / reaction.sequence_gradient.count
    G_token = length * reaction.gradient.second_moment.to(W)
    C_token = stats.moments.covariance.to(W)
    # Sequences are fewer than tokens, often fewer than dimensions.
    sequences = reaction.sequence_gradient.count
    G_shared = _shrunk(reaction.sequence_gradient.second_moment.to(W), G_token, sequences)
    C_shared = _shrunk(reaction.sequence_mean.covariance.to(W), C_token, sequences)
    G, C = [G_shared, G_token], [C_shared, C_token - C_shared]
    gram_g = torch.stack([torch.stack([(a * b).sum() for b in G]) for a in G])
    gram_c = torch.stack([torch.stack([(a * b).sum() for b in C]) for a in C])
    # Power iteration on the pair's coefficients; all inner products of such matrices are
    # positive, so it converges to the positive solution.
    a = torch.ones(2).to(W)
    for _ in range(50):
        b = gram_g @ a
        a = gram_c @ b
        a = a / a.sum()
    G_best = sum((x * g for x, g in zip(a, G, strict=True)), torch.zeros_like(G[0]))
    b = gram_g @ a / (a @ gram_g @ a)
    C_best = sum((x * c for x, c in zip(b, C, strict=True)), torch.zeros_like(C[0]))
    return G_best, C_best
