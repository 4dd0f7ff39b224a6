"""The radial part of an update: when a weight is scale-invariant, and how to leave it out.

The loss of a scale-invariant weight does not change when the weight is scaled, so its gradient is
orthogonal to it. Momentum is not: it carries gradients of older weights, lets the norm grow and
the effective step ``lr / |w|^2`` shrink (arXiv 2006.08217). Everything that lowers updates' radial
part shares this file; it knows nothing of moments.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim.channels import Channels, channels_of
from fullrank.optim.sharded import local

NONE, CHANNEL, LAYER = 0, 1, 2
"""What a test can find: no view passes, every channel does, the layer as a whole does."""

_LEAST_EPS = 2e-19


class RadialTest:
    """What the test of one weight compares; see :func:`scale_invariance`.

    On the host, :meth:`settle` finds the branch with the least work. Elsewhere nothing is read
    from the device: :attr:`branch` and :meth:`coefficients` are tensors.

    Parameters
    ----------
    dots
        ``(channels,)`` products of gradient and weight, row by row, in float32 at least.
    grad_norms, weight_norms
        ``(channels,)`` norms of their rows.
    size
        Elements of a row.
    delta, eps
        As they were given.
    channels
        How sums over the weight's channels are made.
    """

    def __init__(
        self,
        dots: Tensor,
        grad_norms: Tensor,
        weight_norms: Tensor,
        size: int,
        delta: float,
        eps: float,
        channels: Channels,
    ) -> None:
        self.dots, self.grad_norms, self.weight_norms = dots, grad_norms, weight_norms
        self.size, self.delta, self.channels = size, delta, channels
        # A row of zeros must not divide by zero, eps or none; the square of this is normal.
        self.eps = max(eps, _LEAST_EPS)
        self._settled: int | None = None

    def _channel_cosine(self) -> Tensor:
        least = self.grad_norms.clamp_min(self.eps).mul_(self.weight_norms.clamp_min(self.eps))
        return torch.div(self.dots, least, out=least).abs_().amax()

    def _layer_cosine(self) -> Tensor:
        grad, weight = (
            torch.linalg.vector_norm(norms).clamp_min(self.eps)
            for norms in (self.grad_norms, self.weight_norms)
        )
        cosine: Tensor = self.dots.sum().abs() / (grad * weight)
        return cosine

    @property
    def _thresholds(self) -> tuple[float, float]:
        return self.delta / sqrt(self.size), self.delta / sqrt(self.size * len(self.dots))

    @property
    def branch(self) -> Tensor:
        """``NONE``, ``CHANNEL`` or ``LAYER``, 0-d."""
        if self._settled is not None:
            return torch.tensor(self._settled)
        channel, layer = self._thresholds
        by_layer = torch.where(self._layer_cosine() < layer, LAYER, NONE)
        return torch.where(self._channel_cosine() < channel, CHANNEL, by_layer)

    def settle(self) -> int:
        """Read the branch; on an accelerator this waits."""
        if self._settled is None:
            channel, layer = self._thresholds
            if self._channel_cosine().item() < channel:
                self._settled = CHANNEL
            else:
                self._settled = LAYER if self._layer_cosine().item() < layer else NONE
        return self._settled

    def coefficients(self, weight: Tensor, update: Tensor, scratch: Tensor | None = None) -> Tensor:
        """How much of the weight the update holds: ``u - c * w`` has no radial part.

        Parameters
        ----------
        weight, update
            Tensors of one shape; of a weight that is spread over processes, this one's parts.
        scratch
            Memory for their product; see :func:`scale_invariance`.

        Returns
        -------
        Tensor
            ``c``, which broadcasts against the weight: one number a channel, or one for the
            layer where it is known that this is the branch; zeros where no view passed.
        """
        return self.held(self.channels.dots(weight, update, scratch), weight)

    def held(self, along: Tensor, weight: Tensor) -> Tensor:
        """The same from the products of weight and update, channel by channel."""
        if self._settled == CHANNEL:
            found = self._by_channel(along)
        elif self._settled == LAYER:
            found = self._by_layer(along)
        else:
            branch = self.branch
            found = torch.where(branch == CHANNEL, self._by_channel(along), self._by_layer(along))
            found = torch.where(branch == NONE, torch.zeros_like(found), found)
        return self.channels.beside(found, weight)

    def _by_channel(self, along: Tensor) -> Tensor:
        return torch.div(along, (self.weight_norms + self.eps).square_())

    def _by_layer(self, along: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(self.weight_norms) + self.eps
        return torch.div(along.sum(), norm.square_())

    def kept_decay(self, wd_ratio: float) -> float | Tensor:
        """rho: the part of the weight decay that stays, ``wd_ratio`` where a view passed."""
        if self._settled is not None:
            return 1.0 if self._settled == NONE else wd_ratio
        one = self.dots.new_ones(())
        return torch.where(self.branch == NONE, one, one * wd_ratio)


def scale_invariance(
    weight: Tensor,
    grad: Tensor,
    delta: float = 0.1,
    eps: float = 1e-8,
    channel_dim: int = 0,
    scratch: Tensor | None = None,
    grad_norms: Tensor | None = None,
) -> RadialTest:
    """Test whether a weight looks scale-invariant: is its gradient orthogonal to it?

    A view passes when ``max_i |cos(g_i, w_i)| < delta / sqrt(d)`` over its rows of ``d`` elements
    (section 4 of the paper and the official code, with the absolute value that the printed
    algorithm lacks). The channel view comes first; the layer view, one row, is asked only when
    that fails.

    Parameters
    ----------
    weight, grad
        A weight of two or more dimensions before the step, and its raw gradient; whole, or
        spread over processes.
    delta
        Threshold on the cosine, relative to a random direction's ``1 / sqrt(d)``: 0.1.
    eps
        Least norm that counts in a cosine: 1e-8. Rows of zeros have the cosine 0.
    channel_dim
        Dimension that counts the channels: 0; 1 for transposed convolutions.
    scratch
        At least as many elements as the weight has, to be written over: many weights tested in
        the same memory find it in the cache.
    grad_norms
        Norms of the gradient's channels, where they are known.

    Returns
    -------
    RadialTest
        Its ``branch``: 0 where no view passes, 1 where every channel does, 2 for the layer.
        Nothing has been read from the device yet.

    Examples
    --------
    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> scale_invariance(weight, torch.tensor([[0.0, 3.0], [1.0, 0.0]])).settle()  # each row
    1
    >>> scale_invariance(weight, torch.tensor([[2.0, 0.0], [0.0, -1.0]])).settle()  # only the sum
    2
    """
    channels = channels_of(weight, channel_dim)
    size = weight.numel() // weight.shape[channel_dim]
    w, g = local(weight), local(grad)
    dots = channels.dots(g, w, scratch)
    if grad_norms is None:
        grad_norms = channels.norms(g)
    return RadialTest(dots, grad_norms, channels.norms(w), size, delta, eps, channels)


def project_radial(
    update: Tensor,
    weight: Tensor,
    grad: Tensor,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    eps: float = 1e-8,
    *,
    channel_dim: int = 0,
) -> tuple[Tensor, Tensor]:
    """Take the radial part out of an update, where the weight looks scale-invariant.

    Parameters
    ----------
    update
        The direction u that is about to be subtracted from the weight; not changed.
    weight, grad
        The weight before the step and its raw gradient, of the same shape. Vectors and scalars
        are never projected.
    delta, eps, channel_dim
        See :func:`scale_invariance`.
    wd_ratio
        The part of the weight decay that a projected weight keeps: 0.1.

    Returns
    -------
    tuple
        The update without its radial part (or as it was), and the 0-d ratio for the decay:
        ``wd_ratio`` where projected, otherwise 1. Neither waits for the device.

    Raises
    ------
    InputError
        When the three differ in shape.

    Examples
    --------
    >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> grad = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> project_radial(torch.ones(2, 2), weight, grad)
    (tensor([[0., 1.],
            [1., 0.]]), tensor(0.1000))
    """
    if not update.shape == weight.shape == grad.shape:
        raise InputError(
            f"update {tuple(update.shape)}, weight {tuple(weight.shape)} and grad "
            f"{tuple(grad.shape)} must have one shape"
        )
    if weight.dim() < 2 or weight.numel() == 0:
        return update.clone(), torch.ones((), dtype=update.dtype, device=update.device)
    found = scale_invariance(weight, grad, delta, eps, channel_dim)
    projected = update - (found.coefficients(weight, update) * weight).to(update.dtype)
    return projected, torch.as_tensor(found.kept_decay(wd_ratio)).to(update.dtype)
