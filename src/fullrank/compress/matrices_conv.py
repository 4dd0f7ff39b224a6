"""How a convolution's weight is read as a matrix, or a stack of them."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from fullrank.compress.matricised import Matricised, float_weight
from fullrank.core.errors import InputError

ConvScheme = Literal["channel", "spatial", "decouple"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matricise_conv(module: nn.Module, scheme: str) -> Matricised:
    """Read a convolution's weight, ``(N, C, *kernel)``, as a matrix.

    Parameters
    ----------
    module
        ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` without groups, and ``"channel"`` also with.
    scheme
        ``"channel"``: ``N x (C k)``, k the product of the kernel's sizes; with g groups a stack
        ``(g, N / g, C k / g)``. ``"spatial"``: ``(C kh) x (N kw)``, for two dimensions.
        ``"decouple"``: each filter alone, a stack ``(N, C, k)``.

    Raises
    ------
    InputError
        On another module, an unknown scheme, or a scheme that the convolution does not have.

    Examples
    --------
    >>> conv = nn.Conv2d(3, 8, kernel_size=(5, 1))
    >>> [tuple(matricise_conv(conv, scheme).matrix.shape) for scheme in get_args(ConvScheme)]
    [(8, 15), (15, 8), (8, 3, 5)]
    """
    _known(scheme)
    if not isinstance(module, CONVOLUTIONS):
        raise InputError(f"a {type(module).__name__} is no convolution that is read as a matrix")
    weight = float_weight(module)
    groups, shape = module.groups, weight.shape
    if scheme != "channel" and groups > 1:
        raise InputError(f"a convolution in {groups} groups is read by 'channel' only")
    if scheme == "channel":
        stacked = (groups,) if groups > 1 else ()
        matrix = weight.reshape(*stacked, shape[0] // groups, -1)
        return Matricised(matrix, lambda found: found.reshape(shape), scheme)
    if scheme == "decouple":
        return Matricised(weight.flatten(2), lambda found: found.reshape(shape), scheme)
    if len(shape) != 4:
        raise InputError(f"scheme 'spatial' splits two dimensions; the kernel has {len(shape) - 2}")
    return Matricised(_spatial(weight), lambda found: _unfold_spatial(found, tuple(shape)), scheme)


def scheme_for(module: nn.Module, wanted: str) -> str:
    """Return the scheme wanted, or ``"channel"`` for a convolution that is not read by it.

    >>> scheme_for(nn.Conv2d(4, 8, 3), "spatial"), scheme_for(nn.Conv1d(4, 8, 3), "spatial")
    ('spatial', 'channel')
    """
    _known(wanted)
    if module.groups != 1 or (wanted == "spatial" and not isinstance(module, nn.Conv2d)):
        return "channel"
    return wanted


def _known(scheme: str) -> None:
    if scheme not in get_args(ConvScheme):
        raise InputError(
            f"scheme {scheme!r}; a convolution is read by {', '.join(get_args(ConvScheme))}"
        )


def _spatial(weight: Tensor) -> Tensor:
    N, C, height, width = weight.shape
    return weight.permute(1, 2, 0, 3).reshape(C * height, N * width)


def _unfold_spatial(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    N, C, height, width = shape
    return matrix.reshape(C, height, N, width).permute(2, 0, 1, 3)


def factor_numbers(module: nn.Module, scheme: str, rank: int) -> int:
    """Count the numbers that a convolution's two factors hold at some rank.

    >>> factor_numbers(nn.Conv2d(16, 32, 3), "channel", 4), 4 * (16 * 9 + 32)
    (704, 704)
    """
    found = matricise_conv(module, scheme)
    return found.stack * rank * sum(found.shape)
