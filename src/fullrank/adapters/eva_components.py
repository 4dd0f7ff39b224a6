"""Principal components of a layer's inputs: exact from second moments, or incrementally."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from fullrank.core.moments import Moments


class Components(Protocol):
    """What EVA needs to know of a layer's inputs."""

    @property
    def count(self) -> int:
        """Samples seen."""
        ...

    def update(self, x: Tensor) -> None:
        """Add samples ``(T, n)``."""
        ...

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return components, singular values and explained variances.

        Components are ``(k, n)``, the entry of largest magnitude in each positive; values
        ``(k,)`` of the (centred) inputs; and ``(k,)`` what share of their variance each explains.
        """
        ...

    def converged(self, rank: int) -> bool:
        """Whether more samples would hardly change the first components."""
        ...


class GramComponents:
    """All inputs' second moments, decomposed once: exact, whatever the batches and their order.

    Parameters
    ----------
    width
        n, of the inputs.
    components
        k, to keep.
    center
        Whether the mean is subtracted.
    device
        Where the moments live.

    Examples
    --------
    >>> x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    >>> gram = GramComponents(4, 2, center=False)
    >>> gram.update(x[:20]), gram.update(x[20:])
    (None, None)
    >>> torch.allclose(gram.solve()[1], torch.linalg.svdvals(x)[:2])
    True
    """

    def __init__(
        self, width: int, components: int, *, center: bool, device: torch.device | str = "cpu"
    ) -> None:
        self.moments = Moments(width, device)
        self._k, self._center = components, center

    @property
    def count(self) -> int:
        """Samples seen."""
        return self.moments.count

    def update(self, x: Tensor) -> None:
        """Add samples ``(T, n)``."""
        self.moments.update(x)

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return vectors, values and ratios."""
        moments = self.moments
        matrix = moments.covariance if self._center else moments.second_moment
        squares, vectors = torch.linalg.eigh(matrix)
        squares = squares.flip(0).clamp_min(0)
        kept, rows = squares[: self._k], vectors.flip(1).T[: self._k]
        total = squares.sum()
        # What is rounding beside the largest is no variance: constant inputs explain nothing.
        scale = moments.second_moment.diagonal().sum()
        ratios = torch.where(total > 1e-12 * scale, kept / total.clamp_min(1e-300), 0.0)
        return signed(rows), (kept * moments.count).sqrt(), ratios

    def converged(self, rank: int) -> bool:
        """One pass over the data is all that it takes."""
        return False

    def all_reduce(self) -> None:
        """Add what all processes have seen."""
        self.moments.all_reduce()


class IncrementalComponents:
    """Incremental PCA (Ross et al. 2008), as PEFT and the official code do it, but exact inside.

    Parameters
    ----------
    width, components
        n and k.
    tau
        Cosine to the component before at which one has converged.
    dtype
        Of the arithmetic.

    Examples
    --------
    >>> x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    >>> pca = IncrementalComponents(5, 2)
    >>> pca.update(x[:30]), pca.update(x[30:])
    (None, None)
    >>> pca.solve()[0].shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        width: int,
        components: int,
        *,
        tau: float = 0.99,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.count = 0
        self._k, self._tau, self._dtype = components, tau, dtype
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.variance = torch.zeros(width, dtype=torch.float64)
        self._vectors = self._values = torch.empty(0)
        self._similar = torch.zeros(components, dtype=torch.bool)

    def update(self, x: Tensor) -> None:
        """Add samples ``(T, n)``; fewer than k at the first time are left out."""
        rows = x.reshape(-1, x.shape[-1]).to(self._dtype)
        new = len(rows)
        if new < self._k:
            return
        mean, variance = self.mean.to(rows.device), self.variance.to(rows.device)
        batch = rows.double()
        batch_mean = batch.mean(0)
        total = self.count + new
        both = mean + (batch_mean - mean) * (new / total)
        if self.count:
            drift = math.sqrt(self.count / total * new) * (mean - batch_mean)
            stack = torch.cat(
                [
                    self._values[:, None] * self._vectors,
                    rows - batch_mean.to(rows.dtype),
                    drift.to(rows.dtype)[None],
                ]
            )
        else:
            stack = rows - batch_mean.to(rows.dtype)
        spread = (batch - batch_mean).square().sum(0) + variance * self.count
        spread = spread + (batch_mean - mean).square() * (self.count * new / total)
        _, values, vectors = torch.linalg.svd(stack, full_matrices=False)
        vectors = signed(vectors[: self._k])
        if self.count:
            self._similar = torch.cosine_similarity(vectors, self._vectors) >= self._tau
        self._vectors, self._values = vectors, values[: self._k]
        self.mean, self.variance, self.count = both, spread / total, total

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return vectors, values and ratios."""
        total = self.variance.sum() * self.count
        ratios = self._values.double().square() / total.clamp_min(1e-300)
        return self._vectors, self._values, torch.where(total > 0, ratios, 0.0)

    def converged(self, rank: int) -> bool:
        """Whether the first components stayed where they were in the last update."""
        return self.count > 0 and bool(self._similar[:rank].all())


def signed(rows: Tensor) -> Tensor:
    """Turn each row so that its entry of largest magnitude is positive."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0).to(rows)
