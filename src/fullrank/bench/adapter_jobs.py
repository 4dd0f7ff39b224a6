"""What the comparison of adapters does in a worker: fine-tune, time steps, weigh adapters."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from fullrank.bench.adapter_entrants import Tuning
from fullrank.bench.adapter_scenes import SCENES, Scene
from fullrank.bench.adapter_sizes import AdapterSize
from fullrank.bench.memory import Peak
from fullrank.bench.runs import Job, Result
from fullrank.bench.timing import Stopwatch, interleaved_times, stopwatch
from fullrank.core.batches import moved
from fullrank.core.errors import DivergedError
from fullrank.training.finetune import finetune
from fullrank.training.finetune_adapter import adapted, prepared, trained_model
from fullrank.training.finetune_config import FULL, FinetuneRun
from fullrank.training.finetune_tasks import Task
from fullrank.training.lm_optimizers import make_optimizer
from fullrank.training.processes import Processes
from fullrank.training.quiet import own_randomness, quiet_libraries

# Rate where only time or memory is measured: nothing may diverge there.
_SLOW = 1e-5
# Steps after which the optimizer's state is there.
_MEMORY_STEPS = 3
# The least of so many is the time of a start.
_STARTS = 3
# What does not change what a job finds.
_NOT_OF_A_JOB = ("name", "rates", "seeds")
_NOTHING = Tuning("base", "untouched", FULL)


class Jobs:
    """Makes the jobs of one task."""

    def __init__(self, scene: Scene, device: str) -> None:
        size = dataclasses.asdict(scene.size)
        self._size, self._device = scene.size, device
        self._settings = {
            "size": {k: v for k, v in size.items() if k not in _NOT_OF_A_JOB},
            "data": scene.fingerprint,
            "device": device,
        }

    def base(self) -> Job:
        """Train the base where there is none; measure it as it is."""
        return self._job("base", f"the base of {self._size.task}", _NOTHING)

    def tune(self, tuning: Tuning, lr: float, seed: int) -> Job:
        """One fine-tuning run."""
        label = f"{tuning.title} on {self._size.task}, lr {lr:g}, seed {seed}"
        return self._job("tune", label, tuning, lr=lr, seed=seed)

    def start(self, tuning: Tuning) -> Job:
        """Time of the start, bytes on disk, peak memory."""
        return self._job("start", f"start of {tuning.title} on {self._size.task}", tuning)

    def time(self, tunings: Sequence[Tuning]) -> Job:
        """The time of a step, of all in turns."""
        sections = {tuning.name: self._sections(tuning, _SLOW) for tuning in tunings}
        settings = {**self._settings, "sections": sections, "seed": 0}
        return Job("time", settings, f"times of a step on {self._size.task}")

    def _sections(self, tuning: Tuning, lr: float) -> dict[str, Any]:
        size = self._size
        return {"adapter": tuning.adapter(size), "optimizer": tuning.stepped(lr, size)}

    def _job(
        self, kind: str, label: str, tuning: Tuning, *, lr: float = _SLOW, seed: int = 0
    ) -> Job:
        return Job(kind, {**self._settings, **self._sections(tuning, lr), "seed": seed}, label)


def work(home: Path, job: Job) -> Result:
    """Do a job; ``home`` is where what is trained beforehand is kept."""
    settings = job.settings
    scene = _scene(json.dumps(settings["size"]), home)
    with quiet_libraries(), own_randomness():
        return _WORK[job.kind](scene, settings)


@functools.lru_cache(maxsize=1)
def _scene(size: str, home: Path) -> Scene:
    """Make a scene once in a process: its data are read as they are needed."""
    values = AdapterSize(name="", rates=(), seeds=0, **json.loads(size))
    return SCENES[values.task](values, home)


def _run(scene: Scene, settings: Mapping[str, Any], sections: Mapping[str, Any]) -> FinetuneRun:
    return scene.run(
        sections["adapter"], sections["optimizer"], settings["seed"], settings["device"]
    )


def _base(scene: Scene, settings: Mapping[str, Any]) -> Result:
    known = scene.prepare(settings["device"])
    task = _prepared(scene, _run(scene, settings, settings))
    return {"measures": scene.measured(task.network), **known}


def _tune(scene: Scene, settings: Mapping[str, Any]) -> Result:
    run = _run(scene, settings, settings)
    try:
        tuned = finetune(run, task=scene.task, progress=False)
    except DivergedError as error:
        return {"score": None, "why": str(error)}
    history = tuned.history
    best = history.best
    assert best is not None  # the base is measured first
    losses = [step.loss for step in history.steps]
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "score": best.metric if history.lower_is_better else -best.metric,
        "step": best.step,
        "loss": statistics.fmean(last),
        "measures": scene.measured(tuned.model),
        "trained": tuned.data["trained_parameters"],
        "state_bytes": tuned.memory.peak_bytes,
    }


def _start(scene: Scene, settings: Mapping[str, Any]) -> Result:
    run = _run(scene, settings, settings)
    # Imports and first calls of libraries are not the method's.
    seconds = []
    for _ in range(_STARTS + 1):
        task = _prepared(scene, run)
        with task.form():
            began = time.process_time()
            tuned = adapted(task, run, progress=False)
            seconds.append(time.process_time() - began)
    watched = Peak()
    with task.form():
        stepper = _Stepper(task, tuned, run)
        peak = watched.of(lambda: stepper.steps(_MEMORY_STEPS), stepper.model)
        trained = sum(p.numel() for p in stepper.model.parameters() if p.requires_grad)
    return {
        "start_s": min(seconds[1:]) if run.adapter.method != FULL else 0.0,
        "bytes": _saved_bytes(task, tuned, run),
        "peak_bytes": peak,
        "trained": trained,
    }


def _time(scene: Scene, settings: Mapping[str, Any]) -> Result:
    with ExitStack() as stack:
        steppers = {}
        for name, sections in settings["sections"].items():
            run = _run(scene, settings, sections)
            task = _prepared(scene, run)
            stack.enter_context(task.form())
            steppers[name] = _Stepper(task, adapted(task, run, progress=False), run)
        times = interleaved_times(
            {name: stepper.step for name, stepper in steppers.items()},
            stopwatch(torch.device(settings["device"])),
            cycle=scene.size.cycle,
            cycles=3,
            warmup=2,
            turn=1,
        )
    return {name: {"step_ms": value} for name, (value,) in times.items()}


class _Stepper:
    """A model with its adapter and optimizer, stepped as training does, over its first batches."""

    def __init__(self, task: Task, tuned: Any, run: FinetuneRun) -> None:
        self.model = trained_model(task, tuned).train()
        self._task, self._clip = task, run.loop.clip
        self._optimizer = make_optimizer(self.model, run.optimizer)
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        source = task.calibration()
        device = self._trained[0].device
        self._batches = cycle([moved(next(source), device) for _ in range(4)])

    def step(self, clock: Stopwatch) -> tuple[float]:
        """Make a step; return what it took."""
        batch, autocast = next(self._batches), self._task.autocast
        began = clock()
        device = self._trained[0].device.type
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = self._task.loss(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._trained, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return (clock() - began,)

    def steps(self, count: int) -> None:
        """Make steps without a look at the clock."""
        for _ in range(count):
            self.step(lambda: 0.0)


def _prepared(scene: Scene, run: FinetuneRun) -> Task:
    return prepared(scene.task, run, Processes(), torch.device(run.loop.device or "cpu"))


def _saved_bytes(task: Task, tuned: Any, run: FinetuneRun) -> int:
    """Bytes of what is saved: an adapter, or all weights without one."""
    with tempfile.TemporaryDirectory() as folder:
        if run.adapter.method == FULL:
            task.save_base(Path(folder))
        else:
            tuned.save_pretrained(folder)
        # Beside a model card, which says nothing of the method.
        files = [p for p in Path(folder).rglob("*") if p.is_file() and p.suffix != ".md"]
        return sum(path.stat().st_size for path in files)


_WORK = {"base": _base, "tune": _tune, "start": _start, "time": _time}
