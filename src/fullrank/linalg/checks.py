"""What every function here asks of its input, and in which dtype it then works."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Seed = torch.Generator | int | None
"""A generator on the matrix's device, a seed, or None for the global generator."""


def check_matrix(matrix: Tensor, what: str = "matrix") -> None:
    """Raise unless this is a non-empty, finite, real floating-point matrix.

    Raises
    ------
    ValueError
        Otherwise; the message says what it is.
    """
    if matrix.ndim != 2:
        raise ValueError(f"the {what} has shape {tuple(matrix.shape)}; expected two dimensions")
    if matrix.numel() == 0:
        raise ValueError(f"the {what} of shape {tuple(matrix.shape)} is empty")
    if not matrix.is_floating_point():
        raise ValueError(f"the {what} is of {matrix.dtype}; convert it to a floating-point dtype")
    if not all_finite(matrix):
        raise ValueError(f"the {what} holds NaN or infinite values")


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite: ``isfinite(tensor).all()`` in a tenth of its time.

    >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([1.0, math.nan]))
    (True, False)
    """
    # One that is not makes the sum so; large ones may.
    tensor = tensor.detach()
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def largest_magnitude(matrix: Tensor) -> float:
    """Largest ``|entry|``, NaN if there is one: no temporary of the size of the matrix.

    >>> largest_magnitude(torch.tensor([[1.0, -3.0]]))
    3.0
    """
    # Transposed storage is read in its own order, in a fifth of the time.
    transposed = matrix.ndim == 2 and matrix.stride(0) < matrix.stride(1)
    low, high = torch.aminmax(matrix.detach().T if transposed else matrix.detach())
    return max(-float(low), float(high)) if low == low else math.nan


def range_scale(matrix: Tensor) -> float:
    """Return a power of two to divide by: squares of extreme entries would leave the range.

    It is 1 for all that are not.

    >>> range_scale(torch.tensor([[0.5, 3.0]])), range_scale(torch.tensor([[0.0, 2.0**100]]))
    (1.0, 1.2676506002282294e+30)
    """
    largest = largest_magnitude(matrix)
    safe = 1e100 if matrix.dtype == torch.float64 else 1e8
    if largest == 0.0 or 1 / safe < largest < safe:
        return 1.0
    return float(2.0 ** math.floor(math.log2(largest)))


def check_rank(rank: int, shape: tuple[int, ...]) -> None:
    """Raise unless ``1 <= rank <= min(shape)``."""
    if not 1 <= rank <= min(shape):
        raise ValueError(f"rank {rank} for a matrix {tuple(shape)}; expected 1 to {min(shape)}")


def working(matrix: Tensor) -> Tensor:
    """Return the matrix, detached, in the dtype factorisations run in: float32 at least."""
    detached = matrix.detach()
    return detached if detached.dtype == torch.float64 else detached.float()


def double(matrix: Tensor) -> Tensor:
    """Return the matrix, detached, in float64; on the CPU where the device has none (MPS)."""
    detached = matrix.detach()
    return (detached.cpu() if detached.device.type == "mps" else detached).to(torch.float64)


def gaussian(rows: int, columns: int, like: Tensor, seed: Seed) -> Tensor:
    """Draw a ``(rows, columns)`` standard normal matrix with the dtype and device of ``like``."""
    generator = seed
    if isinstance(seed, int):
        generator = torch.Generator(like.device).manual_seed(seed)
    assert not isinstance(generator, int)
    # Drawn where the generator lives, so that a CPU generator serves any device.
    device = like.device if generator is None else generator.device
    noise = torch.randn(rows, columns, dtype=like.dtype, device=device, generator=generator)
    return noise.to(like.device)
