"""What a benchmark on language models does in a worker: train, time steps, measure memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fullrank.bench.entrants import GAP, Entrant
from fullrank.bench.memory import Peak
from fullrank.bench.runs import Job, Result
from fullrank.bench.sizes import Size
from fullrank.bench.timing import Stopwatch, interleaved_times, stopwatch
from fullrank.core.errors import DivergedError, InputError
from fullrank.datasets.texts import Texts, read_texts
from fullrank.optim import state_bytes
from fullrank.training.lm import train_lm
from fullrank.training.lm_config import LMTraining
from fullrank.training.lm_data import BYTES, load_lm, read_tokenizer
from fullrank.training.lm_optimizers import make_optimizer
from fullrank.training.quiet import own_randomness, precision_of, quiet_libraries

# Bytes of one piece of the sample of the dev part.
_PIECE = 2048
# Learning rate where only time or memory is measured: nothing may diverge there.
_SLOW = 1e-5
# Enough for state to be there and for preconditioners to have been refreshed.
_MEMORY_STEPS = 12


def train_job(
    size: Size, entrant: Entrant, lr: float, seed: int, texts: Texts, source: str, device: str
) -> Job:
    """One training run."""
    run = _run(size, entrant.section(lr, size), seed, device)
    settings = {
        "run": run.as_dict(),
        "source": source,
        "fingerprint": texts.fingerprint,
        "dev_bytes": size.dev_bytes,
    }
    return Job("train", settings, f"{entrant.label} on {texts.name}, lr {lr:g}, seed {seed}")


def time_job(size: Size, entrants: Sequence[Entrant], device: str) -> Job:
    """The time of a step, of all entrants in turns."""
    runs = {e.label: _run(size, e.section(_SLOW, size), 0, device) for e in entrants}
    settings = {"runs": {label: run.as_dict() for label, run in runs.items()}, "cycle": GAP}
    return Job("time", settings, "times of a step")


def memory_job(size: Size, entrant: Entrant, device: str) -> Job:
    """The peak memory of a step of one entrant."""
    run = _run(size, entrant.section(_SLOW, size), 0, device)
    return Job("memory", {"run": run.as_dict()}, f"memory of {entrant.label}")


def _run(size: Size, optimizer: dict[str, Any], seed: int, device: str) -> LMTraining:
    return LMTraining.of(
        {
            "model": {"config": size.model()},
            "data": {
                "tokenizer": BYTES,
                "context": size.context + 1,
                # All of the sample, whose characters may be longer than a byte.
                "dev_bytes": 2 * size.dev_bytes,
            },
            "optimizer": optimizer,
            "loop": {
                "steps": size.steps,
                "batch_size": size.batch,
                "evaluations": size.evaluations,
                "precision": size.precision,
                "device": device,
                "seed": seed,
            },
        }
    )


def work(job: Job) -> Result:
    """Do a job of this module."""
    return _WORK[job.kind](job.settings)


# -- training ----------------------------------------------------------------------------------


def _train(settings: Mapping[str, Any]) -> Result:
    texts = _texts(settings["source"], settings["dev_bytes"], settings["fingerprint"])
    run = LMTraining.of(settings["run"])
    try:
        trained = train_lm(run, texts=texts, progress=False)
    except DivergedError as error:
        return {"loss": None, "why": str(error)}
    history = trained.history
    curve = [[e.step, e.metric] for e in history.evaluations]
    last = history.evaluations[-1].metric
    return {
        # That of the last step, not the best of many: measuring more often must not help.
        "loss": last if math.isfinite(last) else None,
        "curve": [point for point in curve if math.isfinite(point[1])],
        "state_bytes": trained.memory.peak_bytes,
        "parameters": trained.data["parameters"],
        "steps": history.steps[-1].step,
        "tokens": history.steps[-1].tokens,
    }


@functools.cache
def _texts(source: str, dev_bytes: int, fingerprint: str) -> Texts:
    """Read texts once in a process."""
    texts = read_texts(source)
    if texts.fingerprint != fingerprint:
        raise InputError(f"the texts of {source} have changed; start again with a new folder")
    return sampled(texts, dev_bytes)


def sampled(texts: Texts, size: int) -> Texts:
    """Keep pieces of the dev part from all over it, of so many bytes together.

    The first documents alone would say little about the others.

    >>> texts = Texts("abc", {"train": ("a",), "dev": ("a" * 5000, "b" * 5000)})
    >>> [piece.strip()[:3] for piece in sampled(texts, 4096).parts["dev"]]
    ['aaa', 'bbb']
    """
    whole = "\n".join(texts.parts["dev"]).encode()
    count = max(1, size // _PIECE)
    if len(whole) <= count * _PIECE:
        return texts
    starts = [i * len(whole) // count for i in range(count)]
    pieces = tuple(whole[at : at + _PIECE].decode(errors="ignore") for at in starts)
    return Texts(texts.name, {**texts.parts, "dev": pieces}, texts.manifest)


# -- time and memory ---------------------------------------------------------------------------


class _Stepper:
    """A model and its optimizer, stepped as training does, on tokens at random."""

    def __init__(self, run: LMTraining) -> None:
        torch.manual_seed(run.loop.seed)
        tokenizer = read_tokenizer(BYTES)
        device = torch.device(run.loop.device or "cpu")
        model = load_lm(None, run.model.config, tokenizer, run.model.dtype)
        self.model = model.to(device).train()
        self.optimizer = make_optimizer(self.model, run.optimizer)
        self._clip = run.loop.clip
        self._autocast = precision_of(run.loop.precision, device)
        shape = (run.loop.batch_size, run.data.context)
        self._tokens = torch.randint(0, 256, shape, device=device)

    def step(self, clock: Stopwatch) -> tuple[float, float]:
        """Make a step; return what the passes took, and the optimizer."""
        began = clock()
        kind = self._tokens.device.type
        with torch.autocast(kind, self._autocast, enabled=self._autocast is not None):
            loss = self.model(input_ids=self._tokens, labels=self._tokens).loss
        loss.backward()
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        middle = clock()
        # MKOR-H is not shown the loss: it stays what it is before it leaves off.
        self.optimizer.step()
        self.optimizer.zero_grad()
        return middle - began, clock() - middle


def _time(settings: Mapping[str, Any]) -> Result:
    runs = {label: LMTraining.of(run) for label, run in settings["runs"].items()}
    with quiet_libraries(), own_randomness():
        steppers = {label: _Stepper(run) for label, run in runs.items()}
        device = next(iter(steppers.values())).model.device
        times = interleaved_times(
            {label: stepper.step for label, stepper in steppers.items()},
            stopwatch(device),
            cycle=settings["cycle"],
        )
    return {
        label: {"passes": passes, "optimizer": optimizer}
        for label, (passes, optimizer) in times.items()
    }


def _memory(settings: Mapping[str, Any]) -> Result:
    run = LMTraining.of(settings["run"])
    with quiet_libraries(), own_randomness():
        watched = Peak()
        stepper = _Stepper(run)
        peak = watched.of(lambda: _steps(stepper, _MEMORY_STEPS), stepper.model)
    return {"peak_bytes": peak, "state_bytes": state_bytes(stepper.optimizer)}


def _steps(stepper: _Stepper, count: int) -> None:
    for _ in range(count):
        stepper.step(lambda: 0.0)


_WORK: dict[str, Callable[[Mapping[str, Any]], Result]] = {
    "train": _train,
    "time": _time,
    "memory": _memory,
}
