"""Whether a layer's factors run faster than the layer itself on this machine: measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fullrank.compress.layers_build import shell
from fullrank.core.batches import Batch, call, device_of, moved
from fullrank.core.capture import capture
from fullrank.core.errors import InputError
from fullrank.core.modes import evaluating
from fullrank.core.plan import PlanEntry, RankPlan

# Rounds of one timing each; dense and factorised take turns, so that both see the same machine.
_ROUNDS = 15
# Other work on the machine only ever adds time: the least of all rounds is the layer's own. Where
# two are nearer than this there are more rounds to come.
_NEAR, _MORE = 1.25, 3
# Factors that lose by less are not told from the layer, and they are smaller.
_TIE = 1.05
# A timing repeats the call until it takes about so long: a clock and a thread pool have grain.
_SECONDS = 1e-3

Clock = Callable[[nn.Module, Tensor, int], float]


class Timing(NamedTuple):
    """Seconds that one call takes."""

    dense: float
    factorised: float

    @property
    def slower(self) -> bool:
        """Whether the factors are slower by more than two timings of the same work differ."""
        return self.factorised > _TIE * self.dense


_measured: dict[tuple[object, ...], Timing] = {}


def faster_only(model: nn.Module, plan: RankPlan, example: Batch) -> RankPlan:
    """Leave those layers dense whose factors are slower here than the layer itself.

    Slower by more than a twentieth, that is: less is noise. Near break-even two thin products cost
    more than one: there are two to start, and thin ones use a processor less well. How near depends
    on the machine and on the size of the input, so that every distinct layer, rank and input size
    is timed, once in a process.

    Parameters
    ----------
    model
        The dense model; it is not changed.
    plan
        For the purpose ``"factor"``.
    example
        A batch of the size that the model will serve.

    Returns
    -------
    RankPlan
        Entries of slower layers have no rank and say what was measured. The option ``"seconds"``
        of every timed layer keeps both times and the input's shape. A layer that the model does
        not use on the example keeps its entry.

    Raises
    ------
    PlanError
        When the plan is for another model or purpose.
    InputError
        When the example reaches none of the layers.

    Examples
    --------
    >>> from fullrank.compress import Fixed, make_plan
    >>> model = nn.Sequential(nn.Linear(512, 512))
    >>> plan = make_plan(model, Fixed(8))
    >>> faster_only(model, plan, torch.randn(256, 512))["0"].rank
    8
    """
    targets = plan.check(model, "factor")
    inputs = _inputs(model, targets, example) if targets else {}
    if targets and not inputs:
        raise InputError("the example reaches none of the layers that the plan names")

    def kept(name: str, entry: PlanEntry) -> PlanEntry:
        if name not in inputs:
            return entry
        found = layer_timing(targets[name], entry, inputs[name])
        shape = list(inputs[name].shape)
        measured = {"dense": found.dense, "factorised": found.factorised, "input": shape}
        timed = replace(entry, options={**entry.options, "seconds": measured})
        if not found.slower:
            return timed
        times = f"{found.dense * 1e3:.3g} ms dense, {found.factorised * 1e3:.3g} ms at rank"
        reason = f"{entry.reason}: left dense, {times} {entry.rank} on {_times(shape)}"
        return replace(timed, rank=None, reason=reason.removeprefix(": "))

    return plan.map(kept)


def _times(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def layer_timing(module: nn.Module, entry: PlanEntry, x: Tensor) -> Timing:
    """Time a layer and its factors on an input; remembered for layers and inputs of that size."""
    where = (x.device, x.dtype, tuple(x.shape), torch.get_num_threads())
    key = (type(module), repr(module), _weight_form(module), entry.rank, entry.scheme, *where)
    if key not in _measured:
        with evaluating(module), torch.no_grad():
            _measured[key] = _race(module, shell(module, entry).eval(), x)
    return _measured[key]


def _race(dense: nn.Module, factorised: nn.Module, x: Tensor) -> Timing:
    layers = (dense, factorised)
    for layer in layers:
        _clock(layer, x, 1)
    once = [min(_clock(layer, x, 1) for _ in range(2)) for layer in layers]
    calls = [max(1, round(_SECONDS / max(seconds, 1e-9))) for seconds in once]
    best = [float("inf"), float("inf")]
    for n in range(_ROUNDS * _MORE):
        if n >= _ROUNDS and max(best) > _NEAR * min(best):
            break
        for i, layer in enumerate(layers):
            best[i] = min(best[i], _clock(layer, x, calls[i]))
    return Timing(*best)


def _seconds(layer: nn.Module, x: Tensor, calls: int) -> float:
    """Time of one of so many calls."""
    wait = torch.cuda.synchronize if x.device.type == "cuda" else None
    if wait:
        wait(x.device)
    start = time.perf_counter()
    for _ in range(calls):
        layer(x)
    if wait:
        wait(x.device)
    return (time.perf_counter() - start) / calls


_clock: Clock = _seconds


def _inputs(model: nn.Module, targets: dict[str, nn.Module], example: Batch) -> dict[str, Tensor]:
    """Return the largest input of each layer on an example."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        if name not in seen or x.numel() > seen[name].numel():
            seen[name] = x

    with evaluating(model), torch.no_grad(), capture(targets, keep, "input"):
        call(model, moved(example, device_of(model)))
    return seen


def _weight_form(module: nn.Module) -> tuple[object, ...]:
    weight = module.get_parameter("weight")
    return tuple(weight.shape), weight.dtype, weight.stride()
