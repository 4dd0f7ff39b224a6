"""Maestro: train factors whose components stay in order of importance; deploy any prefix.

Horváth, Laskaridis, Rajput, Wang: "Maestro: Uncovering Low-Rank Structures via Trainable
Decomposition", ICML 2024, arXiv 2308.14929. Every layer is a product of two factors from the
start. In each step one of them runs on a random prefix of its components (ordered dropout), a
hierarchical group lasso presses on the tails, and components whose importance falls below a
threshold are hidden for good. One training gives a family of sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fullrank.compress.allocation import LossCurve, allocate, curves_from
from fullrank.compress.batches import Batches
from fullrank.compress.factorization import mark, replace_modules
from fullrank.compress.maestro_layers import Ordered, deployed_layer, ordered_layer, prune
from fullrank.compress.maestro_sampler import PairSampler
from fullrank.compress.targets import Patterns
from fullrank.compress.training_targets import training_targets
from fullrank.core.batches import call
from fullrank.core.errors import InputError
from fullrank.core.modes import evaluating
from fullrank.core.names import canonical_modules, model_fingerprint
from fullrank.core.plan import PlanEntry, RankPlan
from fullrank.core.rank_rules import LayerSpectrum


class Maestro:
    """Factorises a model's layers at full rank, in place, and conducts their training.

    Parameters
    ----------
    model
        Changed in place, before an optimizer is made: weights W become ``B A`` with
        ``A = S^{1/2} V^T`` and ``B = U S^{1/2}`` from their SVD, the same function.
    lam
        Weight of the group lasso. 1e-6 in the official scripts; 5e-3 is their argument's default.
    eps
        Importance below which :meth:`shrink` hides a component: 1e-5 in the official code.
    hierarchical
        Norms of tails (the paper), so that a prefix is kept; False takes norms of single
        components, and the kept ones need not be a prefix.
    include, exclude
        Name patterns of layers; by default every linear and convolutional layer but the output
        head of a language model and grouped convolutions.
    generator
        Seeds the order of draws; all processes of a distributed run need the same. A fixed seed
        by default.

    Attributes
    ----------
    layers : dict
        Canonical name -> the factorised layer.

    Raises
    ------
    InputError
        On a negative or non-finite ``lam`` or ``eps``, or a pattern that matches nothing.

    Notes
    -----
    Train at a learning rate several times smaller than the dense model's. The loss of a sampled
    step is noisy: follow the full model's. With gradient checkpointing, call ``backward`` inside
    ``sample()``, since layers run again then. The official option of a full pass beside the
    sampled one is ``CE(full, labels) + CE(sampled, softmax(full))``, the target detached.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> maestro = Maestro(model, lam=1e-4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> x, y = torch.randn(5, 8), torch.randint(4, (5,))
    >>> for step in range(3):
    ...     with maestro.sample():
    ...         loss = nn.functional.cross_entropy(model(x), y) + maestro.penalty()
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     optimizer.step()
    >>> maestro.shrink()["0"].options["components"]
    8
    >>> _ = maestro.set_ranks({"0": 2, "2": 1})
    >>> maestro.export()
    Sequential(
      (0): LowRankLinear(in_features=8, out_features=16, rank=2, bias=True)
      (1): ReLU()
      (2): LowRankLinear(in_features=16, out_features=4, rank=1, bias=True)
    )
    """

    def __init__(
        self,
        model: nn.Module,
        lam: float = 1e-6,
        eps: float = 1e-5,
        hierarchical: bool = True,
        include: Patterns | None = None,
        exclude: Patterns = (),
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value in {"lam": lam, "eps": eps}.items():
            if not 0 <= value < float("inf"):
                raise InputError(f"{name}={value}; it must not be negative")
        targets = training_targets(model, include, exclude)
        self.model = model
        self.lam, self.eps, self.hierarchical = lam, eps, hierarchical
        self._fingerprint = model_fingerprint(model)
        self.layers: dict[str, Ordered] = {
            name: ordered_layer(name, module) for name, module in targets.items()
        }
        replace_modules(model, self.layers)
        seed = 0
        if generator is not None:
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        self._sampler = PairSampler(self._ranks(), seed)

    def _ranks(self) -> dict[str, int]:
        return {name: layer.full_rank for name, layer in self.layers.items()}

    # -- training --------------------------------------------------------------------------

    @contextmanager
    def sample(
        self, layer: str | None = None, rank: int | None = None
    ) -> Iterator[tuple[str, int]]:
        """Run one layer on a prefix of its components meanwhile; yield its name and the rank.

        The pair is the next of a shuffled list of all (layer, rank) pairs, unless it is given.
        """
        if layer is None:
            name, rank = self._sampler.draw()
        else:
            name, rank = layer, self._checked_rank(layer, rank)
        chosen = self.layers[name]
        before, chosen.active_rank = chosen.active_rank, rank
        try:
            yield name, rank
        finally:
            chosen.active_rank = before

    def penalty(self) -> Tensor:
        """``lam`` times the group lasso of all layers, to add to the loss."""
        lasso = [layer.group_lasso(self.hierarchical).sum() for layer in self.layers.values()]
        return self.lam * torch.stack([term.to(lasso[0]) for term in lasso]).sum()

    def shrink(self) -> RankPlan:
        """Hide the components whose importance is below ``eps``: once an epoch in the paper.

        Hidden components stay in the parameters, and under the lasso, weight decay and momentum;
        see :meth:`prune`.

        Returns
        -------
        RankPlan
            As :meth:`plan`.
        """
        before = self._ranks()
        for layer in self.layers.values():
            layer.keep(layer.importance(self.hierarchical) >= self.eps)
        if self._ranks() != before:
            self._sampler.reset(self._ranks())
        return self.plan()

    def prune(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Remove hidden components from the parameters, and from the optimizer's state.

        The parameters are new ones, which the optimizer then holds in the place of the old. Wrap
        a model for DDP anew afterwards.

        Raises
        ------
        InputError
            When the optimizer keeps something of another shape than the parameters'; nothing
            has changed then.
        """
        prune(self.layers.values(), optimizer)

    # -- sizes -----------------------------------------------------------------------------

    def plan(self) -> RankPlan:
        """Tell what each layer runs on now, as a plan for the dense model.

        An entry's ``components`` option is how many; its rank is None where factors of that many
        would not be smaller than the weight, or none is left.
        """
        entries = {}
        for name, layer in self.layers.items():
            rank, (m, n) = layer.used_rank, layer.matrix_shape
            entries[name] = PlanEntry(
                (m, n),
                rank if 0 < rank * (m + n) <= m * n else None,
                scheme=layer.scheme,
                reason=f"Maestro, eps={self.eps:g}: {rank} of {min(m, n)} components",
                options={"components": rank},
            )
        return RankPlan(entries, fingerprint=self._fingerprint)

    def set_ranks(
        self,
        ranks: Mapping[str, int] | None = None,
        *,
        budget: float | None = None,
        fraction: float | None = None,
    ) -> RankPlan:
        """Run layers on a prefix of their components from now on: one size of the family.

        Parameters
        ----------
        ranks
            Layer name -> rank, from 0 to what is left; other layers run in full.
        budget
            Share in (0, 1] of the parameters that the layers' dense weights have. Ranks are
            chosen by least importance lost per parameter saved (our own rule).
        fraction
            The same share in (0, 1] of each layer's rank, rounded up: the fixed-rank baseline
            when trained so.

        With none of them, every layer runs in full again. Batch statistics belong to one size:
        call :meth:`recalibrate_bn`.

        Raises
        ------
        InputError
            On an unknown layer, a rank out of range, or a share out of range or out of reach.
        """
        if sum(choice is not None for choice in (ranks, budget, fraction)) > 1:
            raise InputError("set_ranks takes one of ranks, budget= and fraction=")
        if budget is not None:
            chosen = self._for_budget(budget)
        elif fraction is not None:
            if not 0 < fraction <= 1:
                raise InputError(f"fraction {fraction}; it is a share in (0, 1]")
            chosen = {
                name: -int(-fraction * layer.full_rank // 1) for name, layer in self.layers.items()
            }
        else:
            chosen = {name: self._checked_rank(name, r) for name, r in (ranks or {}).items()}
        for name, layer in self.layers.items():
            layer.activate(chosen.get(name))
        return self.plan()

    def _checked_rank(self, name: str, rank: int | None) -> int:
        if name not in self.layers:
            known = ", ".join(list(self.layers)[:3])
            raise InputError(f"no factorised layer is named {name!r}; there are {known}, ...")
        top = self.layers[name].full_rank
        if rank is None or not 0 <= rank <= top:
            raise InputError(f"{name}: rank {rank}; it must lie in [0, {top}]")
        return rank

    @property
    def smallest(self) -> float:
        """The smallest budget: share of the dense weights' parameters."""
        curves = self._curves().values()
        return sum(c.steps[0].size for c in curves) / sum(c.steps[-1].size for c in curves)

    def _curves(self) -> dict[str, LossCurve]:
        spectra = {}
        for name, layer in self.layers.items():
            tail = layer.tail_importance().double().cpu().numpy()
            # What is lost beyond rank b is the square of the tail's importance there; of a
            # component, the difference.
            lost = -np.diff(np.append(np.square(tail), 0.0))
            spectra[name] = LayerSpectrum(np.sqrt(np.maximum(lost, 0.0)), layer.matrix_shape)
        return curves_from(spectra, grid=1)

    def _for_budget(self, budget: float) -> dict[str, int]:
        chosen = {}
        for name, rank in allocate(self._curves(), budget).items():
            full = self.layers[name].full_rank
            chosen[name] = full if rank is None else min(rank, full)
        return chosen

    def recalibrate_bn(
        self, loader: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
    ) -> None:
        """Recompute batch-norm statistics at the present ranks, over one pass of training data.

        Parameters
        ----------
        loader
            Batches: tensors, mappings of inputs, or ``(inputs, targets)``.
        forward
            ``(model, batch)``, for batches of another form.

        Raises
        ------
        InputError
            When there is no batch.
        """
        norms = [
            module
            for module in self.model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        ]
        momenta = [norm.momentum for norm in norms]
        seen = 0
        try:
            with evaluating(self.model), torch.no_grad():
                for norm in norms:
                    norm.reset_running_stats()
                    # A cumulative average over all batches.
                    norm.momentum = None
                    norm.train()
                for batch in Batches(self.model, loader) if norms else ():
                    seen += 1
                    if forward is not None:
                        forward(self.model, batch)
                    else:
                        call(self.model, batch[0] if isinstance(batch, (tuple, list)) else batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        if norms and not seen:
            raise InputError("there is no batch to recompute batch-norm statistics from")

    def export(self, merge: bool = True) -> nn.Module:
        """Return the model at its present ranks, without what training needs.

        Parameters
        ----------
        merge
            Multiply layers out whose factors would not be smaller than the dense weight.

        Returns
        -------
        Module
            A copy with :class:`~fullrank.compress.LowRankLinear` layers, which saves and loads as
            every shrunk model. A layer of rank 0 has rank 1 there, and factors of zero.
        """
        model = copy.deepcopy(self.model)
        found = {
            name: deployed_layer(module, merge)
            for name, module in canonical_modules(model)
            if isinstance(module, Ordered)
        }
        replace_modules(model, found)
        mark(model)
        return model

    # -- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where sampling stands and which ranks are set: plain integers.

        Which components are left, and the ranks too, are in the model's own state.
        """
        active = {name: layer.active_rank for name, layer in self.layers.items()}
        return {"sampler": self._sampler.state_dict(), "active": active}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave.

        Raises
        ------
        InputError
            When it is of a model with other layers.
        """
        self._sampler.load_state_dict(state["sampler"])
        for name, layer in self.layers.items():
            layer.activate(state["active"][name])
