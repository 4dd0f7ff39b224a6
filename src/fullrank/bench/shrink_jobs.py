"""What a comparison of shrinking methods does in a worker: train a subject, shrink it, measure."""

from __future__ import annotations

import copy
import functools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fullrank.bench.runs import Job, Result
from fullrank.bench.shrink_entrants import Entrant, chosen_entrants
from fullrank.bench.shrink_sizes import ShrinkSize
from fullrank.bench.shrink_subjects import SUBJECTS
from fullrank.bench.shrink_workbench import Workbench
from fullrank.bench.timing import Step, Stopwatch, interleaved_times, stopwatch
from fullrank.compress.store import save
from fullrank.compress.targets import factorisable
from fullrank.core.batches import Batch, call
from fullrank.core.errors import InputError
from fullrank.training.quiet import own_randomness, quiet_libraries

_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Digits of a value that are kept of each query, image or sequence.
_DIGITS = 5


def original_job(subject: str, size: ShrinkSize) -> Job:
    """Train a subject, where that has not been done, and measure it."""
    return Job("original", {"subject": subject, **size.settings()}, f"{subject}, as it is")


def shrink_job(subject: str, entrant: Entrant, share: float, size: ShrinkSize) -> Job:
    """Shrink a subject to a share, fine-tune it, and measure it before and after."""
    settings = {"subject": subject, "method": entrant.label, "share": share, **size.settings()}
    return Job("shrink", settings, f"{entrant.label} at {share:.0%} on {subject}")


def work(job: Job, folder: str) -> Result:
    """Do a job of this module; trained models are kept in a folder."""
    settings = dict(job.settings)
    settings.pop("method", None)
    settings.pop("share", None)
    with quiet_libraries(), own_randomness():
        torch.manual_seed(0)
        bench, rounds = _workbench(json.dumps(settings), folder), settings["rounds"]
        if job.kind == "original":
            return _original(bench)
        (entrant,) = chosen_entrants([job.settings["method"]])
        return _shrink(bench, entrant, job.settings["share"], rounds)


@functools.lru_cache(maxsize=1)
def _workbench(settings: str, folder: str) -> Workbench:
    values = json.loads(settings)
    subject = SUBJECTS[values.pop("subject")]
    size = ShrinkSize(name="", shares=(), **values)
    return Workbench(subject(size, Path(folder)), size.steps)


def _original(bench: Workbench) -> Result:
    subject = bench.subject
    return {
        "metric": subject.metric,
        "lower_is_better": subject.lower_is_better,
        "clusters": None if subject.clusters is None else [str(c) for c in subject.clusters],
        **_quality(bench, subject.original),
        **_costs(bench, subject.original, sparse=False),
    }


def _shrink(bench: Workbench, entrant: Entrant, share: float, rounds: int) -> Result:
    """Each stage alone: what a method cannot do at this size is said, and the rest goes on."""
    found: Result = {}
    small = None
    try:
        if entrant.shrink is not None:
            make = functools.partial(entrant.shrink, bench, share)
            small, found["seconds"] = bench.timed(make)
            found["one_shot"] = _quality(bench, small)
            found |= _costs(bench, small, entrant.sparse)
            small = copy.deepcopy(small)
        tune = functools.partial(entrant.tune, bench, small, share)
        tuned, found["training_seconds"] = bench.timed(tune)
    except InputError as error:
        return {**found, "why": str(error)}
    found["tuned"] = _quality(bench, tuned)
    found |= _costs(bench, tuned, entrant.sparse)
    found["speed"] = _speed(bench, tuned, rounds)
    return found


def _quality(bench: Workbench, model: nn.Module) -> Result:
    values = bench.subject.values(model)
    if not all(math.isfinite(value) for value in values):
        raise InputError("its outputs are not finite")
    cosine = bench.subject.cosine(model)
    return {"values": [round(float(v), _DIGITS) for v in values], "cosine": cosine}


def _costs(bench: Workbench, model: nn.Module, sparse: bool) -> Result:
    """Parameters, bytes of the files that a user would keep, operations of an example."""
    count: Callable[[Tensor], int] = (
        (lambda p: int(torch.count_nonzero(p))) if sparse else (lambda p: p.numel())
    )
    original = bench.subject.original
    layers = factorisable(original, bench.layers).values()
    dense = sum(layer.get_parameter("weight").numel() for layer in layers)
    parameters = sum(map(count, model.parameters()))
    saved = sum(map(count, original.parameters())) - parameters
    return {
        "parameters": parameters,
        "kept": 1 - saved / dense,
        "bytes": _bytes_on_disk(model),
        "flops": _flops(model, bench.subject.example),
    }


def _bytes_on_disk(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = save(model, Path(folder) / "model")
        return sum(file.stat().st_size for file in path.rglob("*.safetensors"))


def _flops(model: nn.Module, batch: Batch) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(model, batch)
    return int(counter.get_total_flops())


def _speed(bench: Workbench, small: nn.Module, rounds: int) -> dict[str, float]:
    """How many times as fast as the original, in each precision; all take turns."""
    steps: dict[str, Step] = {}
    for name, dtype in _PRECISIONS.items():
        batch = _cast(bench.subject.example, dtype)
        for which, model in (("dense", bench.subject.original), ("small", small)):
            steps[f"{which} {name}"] = _forward(copy.deepcopy(model).to(dtype).eval(), batch)
    clock = stopwatch(torch.device("cpu"))
    times = interleaved_times(steps, clock, cycle=1, cycles=rounds, warmup=2, turn=1)
    return {name: times[f"dense {name}"][0] / times[f"small {name}"][0] for name in _PRECISIONS}


def _forward(model: nn.Module, batch: Batch) -> Step:
    @torch.no_grad()
    def step(clock: Stopwatch) -> tuple[float]:
        began = clock()
        call(model, batch)
        return (clock() - began,)

    return step


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    return batch.to(dtype) if isinstance(batch, Tensor) and batch.is_floating_point() else batch
