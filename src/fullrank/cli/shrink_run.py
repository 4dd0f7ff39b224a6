"""The work of `fullrank shrink`: calibrate, plan or search, recover, report, write."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.cli.shrink_floor import Floor
from fullrank.cli.shrink_metrics import Metric, own_metric
from fullrank.cli.shrink_tasks import Part, Task
from fullrank.core.errors import InputError

if TYPE_CHECKING:
    from fullrank.compress import CalibrationStats, Candidate, RankPlan, Shrunk
    from fullrank.compress.family import Family
    from fullrank.compress.family_training import TrainedMethod
    from fullrank.compress.planning_share import OneShot
    from fullrank.evaluate import FloorTest

    AnyMethod = OneShot | TrainedMethod

WORK = ".work"
# Candidates of a method that a time limit leaves room for.
_IN_TIME = 4
_ANY = "a text of some length " * 100


@dataclass
class Job:
    """What was asked for, with the model it is asked of.

    Attributes
    ----------
    texts
        To calibrate on and to recover with.
    faster
        Whether layers that are slower factorised stay dense.
    solvers
        What a plan that was given makes its layers by.
    """

    task: Task
    texts: Sequence[str]
    methods: Sequence[AnyMethod]
    out: Path
    recover: bool = True
    faster: bool = True
    max_length: int = 64
    steps: int = 100
    seconds: float | None = None
    seed: int = 0
    own: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Sequence[Candidate]] = field(default_factory=dict)
    solvers: Sequence[str] = ()

    # -- what all methods share --------------------------------------------------------------

    @property
    def work(self) -> Path:
        """Where an interrupted run is kept."""
        return self.out / WORK

    @cached_property
    def batches(self) -> list[Any]:
        """Calibration data as the model takes it."""
        # One to check on, where something is trained.
        return self.task.batches(self.texts, self.max_length, at_least=2)

    @cached_property
    def example(self) -> Any:
        """The largest batch: what layers are timed on, if at all."""
        if not self.faster:
            return None
        # Without texts, any will do: how long a layer takes depends on their size alone.
        batches = self.batches if self.texts else self.task.batches([_ANY] * 32, self.max_length)
        return max(batches, key=lambda batch: batch["input_ids"].numel())

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the results depend on."""
        from fullrank.training.checkpoints import weights_digest

        texts = hashlib.sha256(json.dumps(list(self.texts)).encode()).hexdigest()
        return {
            "model": weights_digest(self.task.model),
            "calibration": [texts, self.max_length],
            "seed": self.seed,
        }

    @cached_property
    def stats(self) -> CalibrationStats | None:
        """What the layers see, collected once and kept with the work."""
        from fullrank.compress import CalibrationStats
        from fullrank.compress.planning_share import DATA_FREE, TRAINED
        from fullrank.compress.targets import factorisable
        from fullrank.core.files import atomic_write

        without = (*DATA_FREE, *TRAINED)
        use = {*self.methods, *self.solvers}.difference(without)
        if not self.texts or not use:
            return None
        gradients = "gauss_newton" in use
        identity = json.dumps({**self.identity, "gradients": gradients}, indent=1)
        file, named = self.work / "calibration.safetensors", self.work / "calibration.json"
        if file.is_file() and named.is_file() and named.read_text() == identity:
            return CalibrationStats.load(file)
        stats = CalibrationStats(factorisable(self.task.model), gradients=gradients)
        stats.observe(self.task.model, self.batches, seed=self.seed)
        named.unlink(missing_ok=True)
        stats.save(file)
        # Written last: it says that the statistics are whole, and whose.
        atomic_write(named, identity.encode())
        return stats

    def recovery(self, method: AnyMethod) -> Callable[[Any], None] | None:
        """Return what trains a shrunk model, if it is to be trained."""
        from fullrank.compress import Distillation, PELARecovery

        if not self.recover or not self.texts:
            return None
        kind = PELARecovery if method == "pela" else Distillation
        return kind(
            self.task.model,
            self.batches,
            steps=self.steps,
            seconds=self._seconds_each,
            seed=self.seed,
            progress=True,
            checkpoint=self.work / "recovery.safetensors",
        )

    def metric(self, floor: Floor, part: Part) -> Metric | None:
        """Return the user's metric, on which there is no test part, or the task's."""
        if self.own is None:
            return self.task.metric(floor, part)
        return own_metric(self.own, self.task.tokenizer) if part == "dev" else None

    def family(self, method: AnyMethod) -> Family:
        """Return the plans of every size by a method; some are trained first."""
        from fullrank.compress import TrainedFamily
        from fullrank.compress.planning_share import family_for

        model = self.task.model
        if method != "trp" and method != "maestro":
            return family_for(model, method, self.stats, faster_on=self.example, progress=True)
        return TrainedFamily(
            model,
            method,
            self.batches,
            steps=self.steps,
            seconds=self._seconds_each,
            seed=self.seed,
            progress=True,
            faster_on=self.example,
            checkpoint=self.work / f"{method}.safetensors",
        )

    @property
    def _seconds_each(self) -> float | None:
        """Time of one training."""
        return None if self.seconds is None else self.seconds / len(self.methods) / _IN_TIME

    # -- a plan --------------------------------------------------------------------------------

    def to_plan(self, plan: RankPlan | None, keep: float) -> tuple[Any, RankPlan]:
        """Shrink by a plan, or by the method's plan for a share."""
        from fullrank.compress import factorize, faster_only

        method, model = self.methods[0], self.task.model
        example = self.example
        if plan is None:
            family = self.family(method)
            chosen, build = family.plan(keep), family.build
        else:
            chosen = plan if example is None else faster_only(model, plan, example)
            # The scale of each component shared between the factors, for what follows.
            build = partial(factorize, copy.deepcopy(model), calibration=self.stats, balance="sqrt")
        _check_left(chosen)
        small = build(chosen)
        if recover := self.recovery(method):
            recover(small)
        return small, chosen

    # -- a floor -------------------------------------------------------------------------------

    def to_floor(self, floor: Floor, say: Callable[[Any], None]) -> Shrunk:
        """Search with every method; return the smallest that holds, with its method's curve.

        Raises
        ------
        FloorError
            When no method's plan holds; it names the best of all.
        """
        from fullrank.compress import FloorError

        metric = self.metric(floor, "dev")
        assert metric is not None
        best: Shrunk | None = None
        failure: FloorError | None = None
        for method in self.methods:
            try:
                found = self._search(method, floor, metric)
            except FloorError as error:
                self.curves[method] = error.curve
                failure = _better(failure, error)
            else:
                self.curves[method] = found.curve
                if best is None or found.plan.savings().kept < best.plan.savings().kept:
                    best, self.facts["method"] = found, method
                say(found.table())
        self.facts["curves"] = {
            method: [_figures(c) for c in curve] for method, curve in self.curves.items()
        }
        if best is None:
            assert failure is not None
            raise failure
        self.facts |= {"reference": best.reference, "lower": best.floor_test.lower}
        return best

    def _search(self, method: AnyMethod, floor: Floor, metric: Metric) -> Shrunk:
        from fullrank.compress import SearchRecord, shrink

        record = SearchRecord(
            self.work / method,
            {
                **self.identity,
                "method": method,
                "metric": [floor.metric, self.own, self.task.identity()],
                "recovery": [self.recover, self.steps, self.seconds],
                "faster": self.faster,
            },
        )
        began = time.monotonic()
        family = self.family(method)
        left = None
        if self.seconds is not None:
            # What it took to make the plans counts.
            left = self.seconds / len(self.methods) - (time.monotonic() - began)
        return shrink(
            self.task.model,
            metric,
            floor.value,
            relative=floor.relative,
            lower_is_better=floor.lower_is_better,
            clusters=self.task.clusters(metric, "dev"),
            recover=self.recovery(method) or False,
            method=family,
            record=record,
            seconds=left,
        )

    def tested(self, floor: Floor, small: Any) -> FloorTest | None:
        """Test the floor once on data that took no part in the choice, where there is some."""
        import numpy as np

        from fullrank.evaluate import floor_test

        metric = self.metric(floor, "test")
        if metric is None:
            return None
        values = np.atleast_1d(np.asarray(metric(small), dtype=np.float64))
        if len(values) < 2:
            return None
        base = metric(self.task.model) if floor.relative else np.ones_like(values)
        clusters = self.task.clusters(metric, "test")
        if floor.lower_is_better:
            return floor_test(base, values, 1 / floor.value, clusters=clusters)
        return floor_test(values, base, floor.value, clusters=clusters)

    # -- the result ------------------------------------------------------------------------------

    @contextmanager
    def written(self, small: Any) -> Iterator[Path]:
        """Save the model; what the caller adds to the folder appears with it, or not at all."""
        from fullrank.compress import save

        part = self.out.with_name(f".{self.out.name}.new")
        try:
            # What an interruption left is ours.
            shutil.rmtree(part, ignore_errors=True)
            save(small, part)
            self.task.finish(part)
            yield part
            shutil.rmtree(self.work, ignore_errors=True)
            if self.out.exists():
                self.out.rmdir()
            part.rename(self.out)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def check_folder(out: Path, fresh: bool) -> None:
    """Raise unless a folder is new, empty, or that of an interrupted run; drop that if told to."""
    if out.exists() and (not out.is_dir() or any(p.name != WORK for p in out.iterdir())):
        raise InputError(f"{out} exists already; give a new folder")
    if fresh:
        shutil.rmtree(out / WORK, ignore_errors=True)


def _check_left(plan: RankPlan) -> None:
    """Raise when every layer stays dense: there is nothing to write."""
    if all(entry.rank is None for entry in plan.values()):
        reasons = "; ".join(f"{name}: {e.reason}" for name, e in list(plan.items())[:2])
        raise InputError(
            f"every layer stays dense ({reasons}). Keep less, or pass --any-speed if what counts "
            "is size"
        )


def _better(one: Any, other: Any) -> Any:
    """Return the failure that came closer."""
    if one is None or one.best is None:
        return other
    return other if other.best is not None and other.best.lower > one.best.lower else one


def _figures(candidate: Candidate) -> dict[str, float | bool]:
    names = ("kept", "parameters", "value", "ratio", "lower", "holds", "seconds")
    return {name: getattr(candidate, name) for name in names}
