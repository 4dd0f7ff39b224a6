"""All singular values by way of the smaller Gram matrix: several times faster than an SVD."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.linalg.blas import eigvalsh, gram
from fullrank.linalg.checks import check_matrix, range_scale

# Rows (of the long side) that are converted to float64 at a time: the copy stays in the cache
# and small beside the matrix.
_BLOCK = 4096


@torch.no_grad()
def gram_spectrum(matrix: Tensor) -> Tensor:
    """Singular values of a matrix, from the eigenvalues of its smaller Gram matrix.

    The Gram matrix is accumulated in float64 from the entries as they are, so for float32 and
    narrower input nothing is lost before the squares are summed. What squaring costs is the far
    tail: eigenvalues have an absolute error of a few ``eps * sigma_max^2``, hence a singular
    value ``s`` one of about ``eps * sigma_max^2 / s``. Relative errors stay below 1e-5 for
    ``s >= 1e-5 sigma_max`` and below 1e-9 for ``s >= 1e-3 sigma_max``; values below
    ``1e-8 sigma_max`` are lost in rounding. Measured on 768-wide matrices with power-law spectra
    ``i^-p``: at most 1e-12 for p = 1, 2e-6 for p = 2.

    Parameters
    ----------
    matrix
        ``(m, n)``, any floating-point dtype, any strides.

    Returns
    -------
    Tensor
        ``(min(m, n),)``, float64, descending, on the matrix's device (the CPU for devices
        without float64). Zeros for a zero matrix.

    Raises
    ------
    ValueError
        On a matrix that is empty, not finite, no matrix, or not of a floating-point dtype.

    Examples
    --------
    >>> import torch
    >>> gram_spectrum(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])).tolist()
    [4.0, 3.0]
    """
    check_matrix(matrix)
    tall = matrix.detach() if matrix.shape[0] >= matrix.shape[1] else matrix.detach().T
    if tall.device.type == "mps":
        tall = tall.cpu()
    scale = range_scale(tall)
    values = eigvalsh(_gram(tall, scale))
    return values.flip(0).clamp_min(0).sqrt() * scale


def _gram(tall: Tensor, scale: float) -> Tensor:
    n = tall.shape[1]
    total = torch.zeros(n, n, dtype=torch.float64, device=tall.device)
    for start in range(0, len(tall), _BLOCK):
        block = tall[start : start + _BLOCK].to(torch.float64)
        total += gram(block if scale == 1.0 else block / scale)
    return total
