"""Factorised layers whose components are in order of importance: any prefix of them is a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fullrank.compress.conv_split import split_conv
from fullrank.compress.layers import LowRankLinear
from fullrank.compress.layers_conv import LowRankConv, LowRankConv1d, LowRankConv2d, LowRankConv3d
from fullrank.compress.matrices import is_conv1d, matricise
from fullrank.compress.matrices_conv import matricise_conv
from fullrank.compress.solvers import decompose
from fullrank.compress.targets import is_linear
from fullrank.core.errors import InputError


class Ordered(nn.Module):
    """What Maestro adds to a factorised layer of rank d.

    Component b is row b of ``first`` and column b of ``second``.

    Attributes
    ----------
    kept : Tensor
        ``(d,)`` bool, a buffer: the components that shrinking has left. Hidden ones stay in the
        parameters, where the optimizer holds them, and get no gradient from the data.
    active_rank : int or None
        Run on the first so many of the kept components; None on all of them.
    active : Tensor
        What :meth:`activate` has made of it, a buffer, so that a state has it: -1 for None.
    """

    first: nn.Parameter
    second: nn.Parameter
    bias: Tensor | None
    method: str
    scheme: str
    kept: Tensor
    active: Tensor
    active_rank: int | None = None
    # What `kept` says, where it can be read without waiting for a device (as `active_rank` is).
    _count: int
    _index: Tensor | None

    def order_components(self) -> None:
        """Keep every component; call once the factors are there."""
        self.register_buffer("kept", torch.empty(0, dtype=torch.bool))
        self.register_buffer("active", torch.tensor(-1, device=self.first.device))
        self.keep(torch.ones(len(self.first), dtype=torch.bool, device=self.first.device))

    def activate(self, rank: int | None) -> None:
        """Run on the first so many components from now on, also where this state is loaded."""
        self.active_rank = rank
        self.active.fill_(-1 if rank is None else rank)

    def keep(self, mask: Tensor) -> None:
        """Hide all components but these; they need not be a prefix."""
        self.kept = mask
        self._read_mask()

    def _read_mask(self) -> None:
        index = self.kept.nonzero()[:, 0]
        self._count = len(index)
        prefix = self._count == 0 or int(index[-1]) == self._count - 1
        self._index = None if prefix else index

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(m, n)`` of the weight, read as a matrix."""
        raise NotImplementedError

    def plain(self, rank: int) -> LowRankLinear | LowRankConv:
        """Return an empty layer of another rank, without what training needs."""
        raise NotImplementedError

    @property
    def full_rank(self) -> int:
        """Components that are left."""
        return self._count

    @property
    def used_rank(self) -> int:
        """Components that the layer runs on."""
        active = self._count if self.active_rank is None else self.active_rank
        return min(active, self._count)

    def cut(self) -> tuple[Tensor, Tensor]:
        """Both factors, of the components in use only."""
        return self._leading(*self._kept(), self.used_rank)

    def _kept(self) -> tuple[Tensor, Tensor]:
        if self._index is None:
            return self._leading(self.first, self.second, self._count)
        index = self._index.to(self.first.device)
        return self.first.index_select(0, index), self.second.index_select(1, index)

    @staticmethod
    def _leading(first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        # Slices keep the whole parameters in the graph: what they leave out has gradient zero.
        return (first, second) if rank == len(first) else (first[:rank], second[:, :rank])

    @torch.no_grad()
    def tail_importance(self) -> Tensor:
        """Importance of the tails of what is left: ``(full_rank,)``.

        An upper bound of the error of the weight when the layer is cut there.
        """
        first, second = self._kept()
        return _norms(first, True) * _norms(second.transpose(0, 1), True)

    @torch.no_grad()
    def cut_error(self) -> float:
        """Relative squared error of the weight in use, against that of all that is left."""
        # Apple's GPUs have no float64.
        first, second = (factor.to("cpu", torch.float64) for factor in self._kept())
        rows, columns = first.flatten(1), second.transpose(0, 1).flatten(1)
        # Gram matrices are small where the weight may not be.
        gram = (rows @ rows.T) * (columns @ columns.T)
        whole, lost = gram.sum(), gram[self.used_rank :, self.used_rank :].sum()
        return float((lost / whole.clamp_min(1e-300)).clamp(0, 1))

    def truncate(self, rank: int) -> None:
        """Refuse: what is kept and what the optimizer holds belong together."""
        raise InputError(
            f"truncating to {rank} would lose track of what is hidden; use Maestro.set_ranks, and "
            "Maestro.export or Maestro.prune"
        )

    def to_dense(self) -> Any:
        """Return the dense layer that computes the same, hidden components left out."""
        return _plain_layer(self).to_dense()

    def component_norms(self, tails: bool) -> tuple[Tensor, Tensor]:
        """Norms of rows of ``first`` and columns of ``second``, hidden ones too: ``(d,)`` each.

        With ``tails`` that of component b is of all components from b on.
        """
        return _norms(self.first, tails), _norms(self.second.transpose(0, 1), tails)

    def group_lasso(self, hierarchical: bool = True) -> Tensor:
        """``||A_b|| + ||B_b||``, or of tails ``||A[b:]|| + ||B[:, b:]||``: ``(d,)``."""
        first, second = self.component_norms(hierarchical)
        return first + second

    @torch.no_grad()
    def importance(self, hierarchical: bool = True) -> Tensor:
        """``||A_b|| ||B_b||``, or of tails, which never increases with b: ``(d,)``."""
        first, second = self.component_norms(hierarchical)
        return first * second

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        first, second = state_dict.get(prefix + "first"), state_dict.get(prefix + "second")
        kept = state_dict.get(prefix + "kept")
        whole = first is not None and second is not None and kept is not None
        if whole and len(first) < len(self.first):
            # A pruned layer's checkpoint loads into one that is not.
            self.first.data = self.first.data[: len(first)].clone()
            self.second.data = self.second.data[:, : len(first)].clone()
            self.kept = self.kept[: len(first)].clone()
        # States from before there was this buffer say nothing of it.
        state_dict.setdefault(prefix + "active", self.active)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._read_mask()
        active = int(self.active)
        self.active_rank = None if active < 0 else active


class OrderedLinear(Ordered, LowRankLinear):
    """A :class:`~fullrank.compress.LowRankLinear` whose components are ordered."""

    scheme = "linear"

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)`` by the components in use."""
        first, second = self.cut()
        return functional.linear(functional.linear(x, first), second, self.bias)

    def merged_weight(self) -> Tensor:
        """The product of the components in use, ``(out, in)``."""
        first, second = self.cut()
        return second @ first

    def plain(self, rank: int) -> LowRankLinear:
        """Return an empty layer of another rank, without what training needs."""
        return LowRankLinear(
            self.in_features,
            self.out_features,
            rank,
            self.bias is not None,
            device=self.first.device,
            dtype=self.first.dtype,
            transposed=self.transposed,
        )


class OrderedConv(Ordered, LowRankConv):
    """A channel-wise :class:`~fullrank.compress.LowRankConv2d` whose components are ordered."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(N, C k)``, k the product of the kernel's sizes."""
        return self.out_channels, self.in_channels * math.prod(self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., C, *size)`` to ``(..., N, *size out)`` by the components in use."""
        first, second = self.cut()
        if len(first):
            return self.run(x, first, second)
        # Of no component only the bias is left, in the shape that one of weight zero has.
        first = torch.cat([first, first.new_zeros(1, *first.shape[1:])])
        second = torch.cat([second, second.new_zeros(len(second), 1, *second.shape[2:])], dim=1)
        return self.run(x, first, second)

    def merged_weight(self) -> Tensor:
        """The dense weight of the components in use, ``(N, C, *kernel)``."""
        return self.merge(*self.cut())

    def plain(self, rank: int) -> LowRankConv:
        """Return an empty layer of another rank, without what training needs."""
        return LowRankConv.like(self, rank, "channel")


class OrderedConv1d(OrderedConv, LowRankConv1d):
    """:class:`OrderedConv` over one dimension."""


class OrderedConv2d(OrderedConv, LowRankConv2d):
    """:class:`OrderedConv` over two dimensions."""


class OrderedConv3d(OrderedConv, LowRankConv3d):
    """:class:`OrderedConv` over three dimensions."""


_CONVOLUTIONS: dict[int, type[OrderedConv]] = {
    1: OrderedConv1d,
    2: OrderedConv2d,
    3: OrderedConv3d,
}


def _norms(rows: Tensor, tails: bool) -> Tensor:
    """Norms of ``(d, ...)`` rows, or of all rows from each one on; gradient 0 where they are 0."""
    # Half precision cannot hold sums of squares.
    wide = torch.promote_types(rows.dtype, torch.float32)
    square = rows.to(wide).flatten(1).square().sum(1)
    if tails:
        square = square.flip(0).cumsum(0).flip(0)
    positive = square > 0
    return torch.where(positive, square, 1).sqrt() * positive


@torch.no_grad()
def prune(layers: Iterable[Any], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Remove hidden components from parameters, and from what an optimizer keeps of them.

    Raises
    ------
    InputError
        When the optimizer keeps something of another shape than the parameter's; nothing has
        changed then.
    """
    cuts = []
    for layer in layers:
        if layer.full_rank < len(layer.kept):
            index = layer.kept.nonzero()[:, 0]
            cuts += [(layer, "first", 0, index), (layer, "second", 1, index)]
    for layer, name, _, _ in cuts if optimizer is not None else ():
        _check_state(optimizer, getattr(layer, name))
    for layer, name, axis, index in cuts:
        old = getattr(layer, name)
        new = nn.Parameter(old.index_select(axis, index), requires_grad=old.requires_grad)
        setattr(layer, name, new)
        if optimizer is not None:
            _hand_over(optimizer, old, new, axis, index)
    for layer, name, _, index in cuts:
        if name == "first":
            layer.keep(torch.ones_like(layer.kept[index]))


def _check_state(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> None:
    assert optimizer is not None
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
            raise InputError(
                f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for a "
                f"parameter {tuple(parameter.shape)}: it cannot be cut with it; make a new one"
            )


def _hand_over(
    optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor, axis: int, index: Tensor
) -> None:
    """Put a cut parameter into an optimizer in the place of the whole one."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = {
            key: value.index_select(axis, index)
            if isinstance(value, Tensor) and value.shape == old.shape
            else value
            for key, value in optimizer.state.pop(old).items()
        }


@torch.no_grad()
def ordered_layer(name: str, module: nn.Module) -> Ordered:
    """Factorise a layer at full rank, into components in order of their singular values."""
    try:
        layer, first, second = (_linear if is_linear(module) else _conv)(module)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    layer.first.copy_(first)
    layer.second.copy_(second)
    if layer.bias is not None:
        layer.bias.copy_(module.get_parameter("bias"))
    layer.method = "maestro"
    layer.order_components()
    trained = module.get_parameter("weight").requires_grad
    return layer.requires_grad_(trained).train(module.training)


def _linear(module: nn.Module) -> tuple[Ordered, Tensor, Tensor]:
    matrix = matricise(module).matrix
    m, n = matrix.shape
    factors = decompose(matrix, "svd").truncate(min(m, n), "sqrt")
    layer = OrderedLinear(
        n,
        m,
        min(m, n),
        module.bias is not None,
        device=matrix.device,
        dtype=matrix.dtype,
        transposed=is_conv1d(module),
    )
    return layer, factors.first, factors.second


def _conv(module: nn.Module) -> tuple[Ordered, Tensor, Tensor]:
    rank = min(matricise_conv(module, "channel").matrix.shape)
    factors = split_conv(module, rank, "channel")
    kind = _CONVOLUTIONS[len(factors.kernel_size)]
    layer = kind.like(module, rank, "channel")
    assert isinstance(layer, OrderedConv)
    return layer, factors.first, factors.second


def deployed_layer(layer: Ordered, merge: bool) -> nn.Module:
    """Build the plain layer that stands for an ordered one at its present rank.

    With ``merge`` it is the dense layer where that is smaller.
    """
    plain, (m, n) = _plain_layer(layer), layer.matrix_shape
    return plain.to_dense() if merge and layer.used_rank * (m + n) > m * n else plain


@torch.no_grad()
def _plain_layer(layer: Ordered) -> LowRankLinear | LowRankConv:
    first, second = layer.cut()
    rank = len(first)
    # Of rank 0 the bias is left: one component of weight zero.
    plain = layer.plain(max(rank, 1))
    plain.first.copy_(first if rank else torch.zeros_like(plain.first))
    plain.second.copy_(second if rank else torch.zeros_like(plain.second))
    if plain.bias is not None and layer.bias is not None:
        plain.bias.copy_(layer.bias)
    plain.method = layer.method
    plain.error = layer.cut_error()
    return plain.requires_grad_(layer.first.requires_grad).train(layer.training)
