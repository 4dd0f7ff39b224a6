"""TRP: push weights to low rank while they are trained, so that splitting them costs nothing.

Xu, Li, Zhang, Wen, Wang, Dai, Qi, Chen, Lin, Xiong: "TRP: Trained Rank Pruning for Efficient
Deep Neural Networks", IJCAI 2020, arXiv 2004.14566. Every ``period`` steps each convolution is
replaced by its truncation to a share of its energy, and the nuclear norm's subgradient is added to
that step's gradient. In between, the full weight is trained as ever: no layer is given a rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from fullrank.compress.factorization import mark, replace_modules
from fullrank.compress.layers_build import build_layer
from fullrank.compress.matrices import Matricised, matricise
from fullrank.compress.matrices_conv import ConvScheme
from fullrank.compress.planning import entry_for
from fullrank.compress.stacked_svd import components
from fullrank.compress.targets import Patterns, is_linear
from fullrank.compress.training_targets import is_convolution, training_targets
from fullrank.compress.trp_truncation import truncate
from fullrank.core.errors import InputError
from fullrank.core.names import canonical_modules, model_fingerprint
from fullrank.core.plan import PlanEntry, RankPlan
from fullrank.core.rank_rules import Energy, RankRule, Value


class TRP:
    """Truncates a model's convolutions while it is trained.

    Parameters
    ----------
    model
        Trained as usual; its weights are truncated in place.
    scheme
        How a kernel ``(N, C, kh, kw)`` is read as a matrix, and later split: ``"channel"``,
        ``N x (C kh kw)``; ``"spatial"``, ``(C kh) x (N kw)``; ``"decouple"``, each filter alone,
        ``C x (kh kw)``. A linear layer is its weight.
    energy
        Share of ``sum s_i^2`` that a truncation retains, in (0, 1]. 0.98 as in the paper, which
        names the share that is lost, 0.02; the official code retains 0.9.
    nuclear_weight
        Weight of the nuclear norm, 3e-4 in the paper; 0 for truncation alone.
    period
        Steps between truncations: 20 in the paper. Each takes an eigendecomposition a layer.
    include, exclude
        Name patterns of layers. Without ``include`` all convolutions with a kernel larger than
        1x1; linear layers and 1x1 convolutions only by name. Grouped and transposed convolutions
        are left alone.
    skip_first
        Leave the first convolution alone, as the official code does.
    truncate
        False keeps the weights and adds the subgradient only ("nuclear norm only").
    nuclear_every_step
        Add the subgradient at every step rather than at truncations only, as the official code
        does; costs a decomposition a step.

    Attributes
    ----------
    layers : dict
        Canonical name -> module, of what is truncated.

    Raises
    ------
    InputError
        On an energy outside (0, 1], a period below 1, a negative weight, a pattern that matches
        nothing, or a name of something that is no convolution or linear layer.

    Notes
    -----
    Only weights are truncated, not momentum, which restores some rank until the next time: split
    right after a truncation, :meth:`refresh`. A model that is an average of weights (EMA) is not
    truncated by truncating its members. Below the energy it was trained at, a truncated network
    loses accuracy faster than an ordinary one.

    Under DDP every process truncates the same weights; under FSDP weights are not whole and are
    refused. With a gradient scaler, unscale before :meth:`after_backward`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3))
    >>> trp = TRP(model, period=2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> for _ in range(4):
    ...     with trp.step():
    ...         loss = model(torch.randn(3, 1, 8, 8)).square().mean()
    ...         optimizer.zero_grad()
    ...         loss.backward()
    ...     optimizer.step()
    >>> list(trp.layers)
    ['2']
    >>> trp.decompose(rule=Value(0.5))[2]
    LowRankConv2d(4, 8, kernel_size=(3, 3), rank=..., scheme='channel', stride=(1, 1), bias=True)
    """

    def __init__(
        self,
        model: nn.Module,
        scheme: ConvScheme = "channel",
        energy: float = 0.98,
        nuclear_weight: float = 3e-4,
        period: int = 20,
        include: Patterns | None = None,
        exclude: Patterns = (),
        skip_first: bool = True,
        *,
        truncate: bool = True,
        nuclear_every_step: bool = False,
    ) -> None:
        if scheme not in get_args(ConvScheme):
            raise InputError(f"scheme {scheme!r}; it is one of {get_args(ConvScheme)}")
        if not 0 < energy <= 1:
            raise InputError(f"energy {energy}; the share to retain lies in (0, 1]")
        if period < 1:
            raise InputError(f"period {period}; it is at least 1")
        if not 0 <= nuclear_weight < float("inf"):
            raise InputError(f"nuclear_weight {nuclear_weight}; it must not be negative")
        self.model = model
        self.scheme: ConvScheme = scheme
        self.energy, self.nuclear_weight, self.period = energy, nuclear_weight, period
        self.truncates, self.nuclear_every_step = truncate, nuclear_every_step
        self.layers = _select(model, scheme, include, exclude, skip_first)
        self._step = 0
        self._subgradients: dict[str, Tensor] = {}

    # -- training --------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        """Put forward and backward of one step inside; ``optimizer.step()`` comes after."""
        self.before_forward()
        yield
        self.after_backward()

    def before_forward(self, step: int | None = None) -> None:
        """Truncate, if it is time.

        Parameters
        ----------
        step
            Number of the step from 0; by default counted here.

        Raises
        ------
        InputError
            When a weight is not finite.
        """
        now = self._step if step is None else step
        self._step = now + 1
        self._subgradients = {}
        due = now % self.period == 0
        if due or self.nuclear_every_step:
            self._truncate(overwrite=due and self.truncates)

    def refresh(self) -> None:
        """Truncate every selected weight now, whatever the step."""
        self._truncate(overwrite=True)
        self._subgradients = {}

    @torch.no_grad()
    def _truncate(self, overwrite: bool) -> None:
        for name, module in self.layers.items():
            found = _read(module, self.scheme)
            try:
                cut = truncate(found.matrix, self.energy)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            if overwrite:
                module.get_parameter("weight").copy_(found.fold(cut.matrix))
            if self.nuclear_weight:
                self._subgradients[name] = found.fold(cut.subgradient)

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add the subgradients that belong to this step to the gradients, once."""
        for name, subgradient in self._subgradients.items():
            gradient = self.layers[name].get_parameter("weight").grad
            if gradient is not None:
                gradient.add_(subgradient, alpha=self.nuclear_weight)
        self._subgradients = {}

    def state_dict(self) -> dict[str, int]:
        """Return the number of the next step, on which the phase depends."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        self._step = int(state["step"])

    # -- after training --------------------------------------------------------------------

    def plan(self, rule: RankRule | None = None, model: nn.Module | None = None) -> RankPlan:
        """Choose a rank for each layer from its present spectrum.

        Parameters
        ----------
        rule
            ``Energy(e)`` or ``Value(t)``, at least rank 1, or any function of a spectrum and a
            shape; the training's energy by default. (The official code: ``Value(0.05)``, and
            ``Energy(0.85)`` for decoupling, whose rank is the largest of all filters'.)
        model
            One of the same architecture in this one's place, e.g. an average of its weights.
        """
        use: RankRule = Energy(self.energy) if rule is None else rule
        where = self.model if model is None else model
        modules = dict(canonical_modules(where))
        entries = {}
        for name in self.layers:
            if name not in modules:
                raise InputError(f"the model has no layer {name!r}, which was trained")
            entries[name] = _entry(modules[name], self.scheme, use)
        return RankPlan(entries, fingerprint=model_fingerprint(where))

    def decompose(
        self,
        model: nn.Module | None = None,
        rule: RankRule | None = None,
        *,
        strided: bool = True,
        inplace: bool = False,
    ) -> nn.Module:
        """Split the truncated layers into two cheaper ones each.

        Parameters
        ----------
        model, rule
            See :meth:`plan`.
        strided
            False leaves layers with a stride whole, as the official code does for channels and
            spatially, although it truncates them in training.
        inplace
            Change the model itself; a copy by default, so that training can go on.

        Returns
        -------
        Module
            With :class:`~fullrank.compress.LowRankConv2d` layers; one that would not become
            smaller stays dense.
        """
        where = self.model if model is None else model
        plan = self.plan(rule, where)
        made = where if inplace else copy.deepcopy(where)
        modules = dict(canonical_modules(made))
        new = {
            name: build_layer(modules[name], entry)
            for name, entry in plan.items()
            if entry.rank is not None and (strided or self._is_unstrided(name))
        }
        replace_modules(made, new)
        mark(made)
        return made

    def _is_unstrided(self, name: str) -> bool:
        return self.scheme == "decouple" or set(getattr(self.layers[name], "stride", (1,))) == {1}


_CLAMPED = (Energy, Value)


def _read(module: nn.Module, scheme: str) -> Matricised:
    return matricise(module, None if is_linear(module) else scheme)


def _entry(module: nn.Module, scheme: ConvScheme, rule: RankRule) -> PlanEntry:
    """Plan one layer: of a stack of matrices, the largest rank."""
    read = _read(module, scheme)
    m, n = read.shape
    spectra = components(read.matrix).sizes.reshape(-1, min(m, n)).cpu().double().numpy()
    found = [rule(spectrum, m, n) for spectrum in spectra]
    if isinstance(rule, _CLAMPED):
        # The official rules can say 0, of which there is no layer.
        found = [rank or 1 for rank in found]
    rank = None if None in found else max(r for r in found if r is not None)
    return entry_for((m, n), rank, "svd", repr(rule), read.scheme, read.stack)


def _select(
    model: nn.Module,
    scheme: ConvScheme,
    include: Patterns | None,
    exclude: Patterns,
    skip_first: bool,
) -> dict[str, nn.Module]:
    def splits(module: nn.Module) -> bool:
        kernel = getattr(module, "kernel_size", ())
        return max(kernel, default=1) > 1 and (scheme != "spatial" or len(kernel) == 2)

    found = training_targets(model, include, exclude, usual=splits)
    for name, module in found.items():
        _check(name, module, scheme)
    if skip_first:
        first = next((m for m in model.modules() if is_convolution(m) and splits(m)), None)
        found = {name: module for name, module in found.items() if module is not first}
        if not found:
            raise InputError(
                "the only layer selected is the first convolution, which is skipped; "
                "skip_first=False takes it too"
            )
    return found


def _check(name: str, module: nn.Module, scheme: ConvScheme) -> None:
    """Refuse what cannot be truncated, before training starts."""
    weight = module.get_parameter("weight")
    if hasattr(weight, "full_tensor"):
        raise InputError(
            f"{name}: its weight is sharded (FSDP), and a part of a matrix has no rank of its own"
        )
    try:
        _read(module, scheme)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
