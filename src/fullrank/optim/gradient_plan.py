"""Ranks for an optimizer from the gradients that a model has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.core.errors import InputError
from fullrank.core.names import canonical_modules, model_fingerprint
from fullrank.core.plan import PlanEntry, RankPlan
from fullrank.core.rank_rules import Energy, LayerSpectrum, ModelRule, RankRule, apply_rule
from fullrank.linalg.checks import all_finite
from fullrank.optim.groups import Patterns, projectable
from fullrank.optim.matrices import matrix_shape
from fullrank.optim.sharded import gathered


@torch.no_grad()
def gradient_plan(
    model: nn.Module,
    rule: RankRule | ModelRule | None = None,
    targets: Patterns | None = None,
    exclude: Patterns = (),
) -> RankPlan:
    """Measure the spectra of a model's gradients and give each weight a rank for its optimizer.

    Call it after the backward passes of one step or several that add up; one batch's gradient has
    no more rank than the batch has rows.

    Parameters
    ----------
    model
        A model with gradients; nothing of it is changed.
    rule
        From a spectrum to a rank, as for :meth:`fullrank.spectra.XRay.plan`; by default
        ``Energy(0.9)``: as many directions as hold 90 % of the gradient's squares.
    targets, exclude
        Which layers, as for :func:`param_groups`.

    Returns
    -------
    RankPlan
        Of purpose ``"optimizer"`` and source ``"gradient"``. Gradients of zeros, and of full
        rank, leave their weights alone.

    Raises
    ------
    InputError
        When no layer that can be projected has a gradient, or one that is not finite.

    Examples
    --------
    >>> from fullrank.optim import GaLoreAdamW, param_groups
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    >>> model(torch.ones(1, 8)).square().sum().backward()
    >>> plan = gradient_plan(model)
    >>> {name: entry.rank for name, entry in plan.items()}
    {'0': 1, '2': 1}
    >>> optimizer = GaLoreAdamW(param_groups(model, plan=plan, verbose=False))
    """
    modules = dict(canonical_modules(model))
    spectra: dict[str, LayerSpectrum] = {}
    idle = []
    for name, weight in projectable(model, targets, exclude).items():
        # A plan names modules by their weight; those of torch's attention are not modules.
        if weight.grad is None or getattr(modules.get(name), "weight", None) is not weight:
            continue
        values = _singular_values(name, gathered(weight.grad))
        shape = matrix_shape(weight.shape)
        if type(modules[name]).__name__ == "Conv1D":
            shape = shape[::-1]
        if values[0] > 0.0:
            spectra[name] = LayerSpectrum(values.numpy(), shape)
        else:
            idle.append((name, shape))
    if not spectra:
        raise InputError(
            "no layer that could be projected has a gradient other than zero; call "
            "loss.backward() first"
        )
    rule = Energy(0.9) if rule is None else rule
    entries = {
        name: _entry(spectra[name], rank, rule) for name, rank in apply_rule(rule, spectra).items()
    }
    entries |= {n: PlanEntry(shape, None, reason="its gradient is zero") for n, shape in idle}
    return RankPlan(
        entries, purpose="optimizer", source="gradient", fingerprint=model_fingerprint(model)
    )


def _singular_values(name: str, grad: Tensor) -> Tensor:
    matrix = grad.detach().reshape(matrix_shape(grad.shape)).double().cpu()
    if not all_finite(matrix):
        raise InputError(f"the gradient of {name} holds NaN or infinity; no rank can be measured")
    values: Tensor = torch.linalg.svdvals(matrix)
    return values


def _entry(spectrum: LayerSpectrum, rank: int | None, rule: object) -> PlanEntry:
    if rank == min(spectrum.shape):
        return PlanEntry(spectrum.shape, None, reason=f"{rule!r}: all directions, left alone")
    return PlanEntry(spectrum.shape, rank, reason=f"{rule!r} of the gradient")
