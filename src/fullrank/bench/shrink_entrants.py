"""The methods of the comparison: how each makes a model of a given size, and trains it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fullrank.bench.shrink_workbench import Workbench
from fullrank.compress.factorization import factorize
from fullrank.compress.family import Allocation, kept_at_most
from fullrank.compress.family_training import energy_plans
from fullrank.compress.family_weights import WeightFamily, WeightMethod
from fullrank.compress.maestro import Maestro
from fullrank.compress.pela import pela_plan
from fullrank.compress.pela_loss import PELALoss
from fullrank.compress.planning import make_plan
from fullrank.compress.solvers import Method
from fullrank.compress.targets import factorisable
from fullrank.compress.trp import TRP
from fullrank.compress.welore import mark_trainable
from fullrank.core.errors import InputError
from fullrank.core.rank_rules import ParamRatio

# Steps between two truncations: the paper's.
_TRP_PERIOD = 20

BASELINE = "pca-uniform"
"""What the others are compared with: feature PCA, the same share for every layer."""


# -- in one shot -------------------------------------------------------------------------------


def _of_family(method: Method, allocation: Allocation) -> Callable[[Workbench, float], nn.Module]:
    def shrink(bench: Workbench, share: float) -> nn.Module:
        family = bench.family(method, allocation)
        return family.build(family.plan(share))

    return shrink


def _svd(bench: Workbench, share: float) -> nn.Module:
    plan = make_plan(bench.subject.original, ParamRatio(1 / share), bench.layers, method="svd")
    return bench.factorised(plan)


def _of_weights(method: WeightMethod) -> Callable[[Workbench, float], nn.Module]:
    def shrink(bench: Workbench, share: float) -> nn.Module:
        family = WeightFamily(bench.subject.original, method, include=bench.layers)
        return bench.factorised(family.plan(share))

    return shrink


def _pela(bench: Workbench, share: float) -> nn.Module:
    plan = pela_plan(bench.subject.original, 1 / share, (), include=bench.layers)
    return bench.factorised(plan)


@torch.no_grad()
def _prune(bench: Workbench, share: float) -> nn.Module:
    """Set the smallest weights of all layers together to zero."""
    model = bench.copy()
    weights = _weights(model, bench.layers)
    sizes = torch.cat([weight.abs().flatten() for weight in weights])
    cut = sizes.kthvalue(max(1, len(sizes) - int(share * len(sizes)))).values
    for weight in weights:
        weight.mul_(weight.abs() > cut)
    return model


def _weights(model: nn.Module, layers: Sequence[str]) -> list[Tensor]:
    return [layer.get_parameter("weight") for layer in factorisable(model, layers).values()]


# -- and trained -------------------------------------------------------------------------------


def _tuned(bench: Workbench, small: nn.Module | None, share: float) -> nn.Module:
    assert small is not None
    return bench.train(small)


def _tuned_welore(bench: Workbench, small: nn.Module | None, share: float) -> nn.Module:
    assert small is not None
    mark_trainable(small)
    return bench.train(small)


def _tuned_pela(bench: Workbench, small: nn.Module | None, share: float) -> nn.Module:
    """The task's loss, the teacher's features, and the weights it started from."""
    assert small is not None
    teacher, subject = bench.copy(), bench.subject
    terms = PELALoss(small, teacher)

    def loss(model: nn.Module, batch: object) -> Tensor:
        total: Tensor = subject.loss(model, batch)
        # Of a batch without labels it returns only what it adds to the task's loss.
        return total + terms(subject.inputs(batch))

    return bench.train(small, loss=loss)


def _tuned_pruned(bench: Workbench, small: nn.Module | None, share: float) -> nn.Module:
    assert small is not None
    weights = _weights(small, bench.layers)
    masks = [weight != 0 for weight in weights]

    @torch.no_grad()
    def again(*_: object) -> None:
        for weight, mask in zip(weights, masks, strict=True):
            weight.mul_(mask)

    return bench.train(small, prepare=lambda o: o.register_step_post_hook(again))


def _trp(bench: Workbench, small: nn.Module | None, share: float) -> nn.Module:
    """Train the dense model towards the energy that has this size, then split it to the size."""
    model, layers = bench.copy(), bench.layers
    energy, _ = kept_at_most(share, energy_plans(model, layers))
    # Every truncation keeps its share of what the one before has left, and there is one at the end.
    truncations = math.ceil(bench.steps / _TRP_PERIOD) + 1
    part = energy ** (1 / truncations)
    trp = TRP(model, energy=part, period=_TRP_PERIOD, include=layers, skip_first=False)

    def loss(model: nn.Module, batch: object) -> Tensor:
        trp.before_forward()
        return bench.subject.loss(model, batch)

    bench.train(
        model,
        loss=loss,
        prepare=lambda o: o.register_step_pre_hook(lambda *_: trp.after_backward()),
    )
    trp.refresh()
    plan = kept_at_most(share, energy_plans(model, layers))[1]
    return factorize(model, plan, balance="sqrt", progress=False)


def _maestro(bench: Workbench, small: nn.Module | None, share: float) -> nn.Module:
    """One training gives all sizes; batch statistics are those of this one."""
    maestro = bench.once("maestro", lambda: _trained_maestro(bench))
    maestro.set_ranks(budget=share)
    draw = bench.subject.training(seed=1)
    maestro.recalibrate_bn([bench.subject.inputs(next(draw)) for _ in range(20)])
    made = maestro.export()
    maestro.set_ranks()
    return made.eval()


def _trained_maestro(bench: Workbench) -> Maestro:
    maestro = Maestro(bench.copy(), include=bench.layers)

    def loss(model: nn.Module, batch: object) -> Tensor:
        with maestro.sample():
            return bench.subject.loss(model, batch) + maestro.penalty()

    bench.train(maestro.model, loss=loss)
    return maestro


@dataclass(frozen=True)
class Entrant:
    """A method.

    Attributes
    ----------
    label
        Its name in the table.
    shrink
        What it makes in one shot of a workbench and a share; None where it shrinks by training.
    tune
        What it makes of that, of a share, with the fine-tuning that all have.
    sparse
        Whether its zeros count as saved, although they are stored and multiplied.
    """

    label: str
    shrink: Callable[[Workbench, float], nn.Module] | None = None
    tune: Callable[[Workbench, nn.Module | None, float], nn.Module] = _tuned
    sparse: bool = False


ENTRANTS = (
    Entrant("gauss_newton", _of_family("gauss_newton", "sensitivity")),
    Entrant("lord", _of_family("output_pca", "sensitivity")),
    Entrant(BASELINE, _of_family("output_pca", "uniform")),
    Entrant("greenformers", _of_weights("greenformers")),
    Entrant("welore", _of_weights("welore"), _tuned_welore),
    Entrant("pela", _pela, _tuned_pela),
    Entrant("trp", None, _trp),
    Entrant("maestro", None, _maestro),
    Entrant("svd", _svd),
    Entrant("magnitude", _prune, _tuned_pruned, sparse=True),
)
"""All methods: ours first, plain SVD and magnitude pruning last."""


def chosen_entrants(labels: Sequence[str] | None) -> tuple[Entrant, ...]:
    """Return the methods of these names, in the table's order; all by default.

    Raises
    ------
    InputError
        For a name that no method has.
    """
    known = {entrant.label: entrant for entrant in ENTRANTS}
    for label in labels or ():
        if label not in known:
            raise InputError(f"no method {label!r}; there are {'; '.join(known)}")
    return tuple(entrant for label, entrant in known.items() if not labels or label in labels)
