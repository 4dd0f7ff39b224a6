"""Principal components of a layer's inputs: exact from second moments, or incrementally."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.core.moments import Moments, _bands

# From this width on products are made in the inputs' own precision, and only the leading
# eigenvectors are computed: both take a fraction of the time.
_WIDE = 1024


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
        self.moments = (_WideMoments if width >= _WIDE else Moments)(width, device)
        self.components, self._center = components, center
        self._solved: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def count(self) -> int:
        """Samples seen."""
        return self.moments.count

    def update(self, x: Tensor) -> None:
        """Add samples ``(T, n)``."""
        self.moments.update(x)
        self._solved = None

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return vectors, values and ratios."""
        if self._solved is None:
            self._solved = self._decomposed()
        return self._solved

    def _decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        moments = self.moments
        matrix = moments.covariance if self._center else moments.second_moment
        squares, rows = leading_eigenvectors(matrix, self.components)
        total = matrix.trace()
        # What is rounding beside the largest is no variance: constant inputs explain nothing.
        scale = moments.second_moment.diagonal().sum()
        ratios = torch.where(total > 1e-12 * scale, squares / total.clamp_min(1e-300), 0.0)
        return signed(rows), (squares * moments.count).sqrt(), ratios

    def converged(self, rank: int) -> bool:
        """One pass over the data is all that it takes."""
        return False

    def all_reduce(self) -> None:
        """Add what all processes have seen."""
        self.moments.all_reduce()
        self._solved = None


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


def leading_eigenvectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues ``(count,)`` and eigenvectors ``(count, n)`` of a covariance.

    Wide matrices by block Lanczos with full reorthogonalisation, until the residuals are 1e-10 of
    the largest eigenvalue: a tenth of the time of all eigenvectors.

    >>> values, rows = leading_eigenvectors(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    >>> values.tolist(), rows.abs().tolist()
    ([3.0, 2.0], [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    """
    width, block = len(matrix), count + 8
    if width >= _WIDE and width >= 16 * block:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(width, block, dtype=matrix.dtype, generator=generator)
        basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
        image = matrix @ basis
        while basis.shape[1] <= width // 2:
            small = basis.T @ image
            values, inner = torch.linalg.eigh((small + small.T) / 2)
            values, inner = values.flip(0)[:count], inner.flip(1)[:, :count]
            vectors = basis @ inner
            residual = (image @ inner - vectors * values).norm(dim=0).max()
            if residual <= 1e-10 * values[0]:
                return values.clamp_min(0), vectors.T
            new = image[:, -block:]
            for _ in range(2):
                new = new - basis @ (basis.T @ new)
            new = torch.linalg.qr(new).Q
            basis, image = torch.cat([basis, new], 1), torch.cat([image, matrix @ new], 1)
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:count].clamp_min(0), vectors.flip(1).T[:count]


class _WideMoments(Moments):
    """Moments whose products are made in the inputs' precision, and summed in float64.

    The first batch's mean is taken out beforehand, so that a large mean does not swallow the
    variance; it is put back, in float64, when the sums are read.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        super().__init__(width, device)
        self._shift: Tensor | None = None
        self._settled = False

    @torch.no_grad()
    def update(self, batch: Tensor, mask: Tensor | None = None) -> None:
        """Add samples ``(T, n)``."""
        rows = batch if mask is None else batch[mask]
        dtype = torch.promote_types(rows.dtype, torch.float32)
        rows = rows.reshape(-1, self.width).to(device=self.sum.device, dtype=dtype)
        shift = rows.mean(0) if self._shift is None and len(rows) else self._shift
        x = rows if shift is None else rows - shift.to(dtype)
        total = x.sum(0, dtype=torch.float64)
        if not torch.isfinite(total).all():
            raise InputError("a batch holds NaN or infinite values; the moments are unchanged")
        self._shift = shift
        self.count += len(x)
        self.sum += total
        for band in _bands(self.width):
            self.second[band, : band.stop] += x[:, band].T @ x[:, : band.stop]

    def _settle(self) -> None:
        if self._shift is None or self._settled:
            return
        shift = self._shift.to(self.sum)
        self.second.addr_(shift, self.sum).addr_(self.sum, shift)
        self.second.addr_(shift, shift, alpha=self.count)
        self.sum += self.count * shift
        # Whatever comes later is summed as it is.
        self._shift, self._settled = torch.zeros_like(shift), True

    @property
    def mean(self) -> Tensor:
        """(d,) mean."""
        self._settle()
        return super().mean

    @property
    def second_moment(self) -> Tensor:
        """(d, d) uncentred second moment."""
        self._settle()
        return super().second_moment

    def all_reduce(self, group: Any = None, device: torch.device | None = None) -> None:
        """Sum over all processes."""
        self._settle()
        super().all_reduce(group, device)
