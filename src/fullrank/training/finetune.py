"""`finetune`: a language model, classifier or encoder, with any adapter and any optimizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fullrank.core.errors import InputError, require
from fullrank.core.models import load_model
from fullrank.core.plan import RankPlan
from fullrank.training.checkpoints import weights_digest
from fullrank.training.finetune_adapter import MakeTask, adapted, prepared, trained_model
from fullrank.training.finetune_config import FULL, FinetuneRun
from fullrank.training.finetune_tasks import Task, make_task
from fullrank.training.fit import Pace, Parts, TokenCounter, carried_out, fit
from fullrank.training.history import TrainingHistory
from fullrank.training.lm_optimizers import make_optimizer
from fullrank.training.optimizers import StateMemory
from fullrank.training.processes import Processes
from fullrank.training.results import put_in_place, read_result, versions


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model and how it came about.

    Attributes
    ----------
    model
        With the best weights, in evaluation mode: a ``PeftModel`` where there is an adapter; for
        encoders the ``SentenceTransformer`` that holds it.
    tuned
        The ``PeftModel``, or the whole model without an adapter.
    history
        Loss curve, development metric at each evaluation, speed.
    memory
        Peak bytes of the optimizer's state against AdamW's.
    config
        The run's settings.
    data
        Counts: of what it was trained on, trained and all numbers.
    adapter
        A row a layer of what the adapter's start found; empty without one, and once a finished
        run is read again.
    folder
        Where it is saved, or None.
    """

    model: Any
    tuned: Any
    history: TrainingHistory
    memory: StateMemory
    config: FinetuneRun
    data: dict[str, Any] = field(default_factory=dict)
    adapter: tuple[Any, ...] = ()
    folder: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything but the model as JSON values: what ``training.json`` holds."""
        best = self.history.best
        return {
            "version": 1,
            "config": self.config.as_dict(),
            "data": self.data,
            "adapter": [vars(layer) for layer in self.adapter],
            "history": self.history.to_json(),
            "best": None if best is None else {"step": best.step, self.history.metric: best.metric},
            "gain": self.history.gain,
            "tokens_per_second": self.history.tokens_per_second,
            "memory": self.memory.to_json(),
            "versions": versions(),
        }


def finetune(
    config: FinetuneRun,
    *,
    data: Any = None,
    task: MakeTask | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    resume: bool = True,
    ranks_every: int = 0,
) -> Finetuned:
    """Fine-tune a model as a run's settings say, and keep its best weights.

    Parameters
    ----------
    config
        Model, data, adapter, optimizer and loop; see :class:`FinetuneRun`.
    data
        Instead of ``config.data.source``: :class:`~fullrank.datasets.Texts`,
        :class:`~fullrank.training.finetune_data.Rows`, or a
        :class:`~fullrank.datasets.Dataset` for an encoder.
    task
        Makes a :class:`~fullrank.training.finetune_tasks.Task` of one's own, from the settings
        and the processes, instead of the one that ``config.model`` and ``config.data`` name.
    out
        New folder for the adapter in PEFT's format (the whole model without one), its tokenizer,
        ``training.json``, ``log.jsonl`` and a plot. An interrupted run leaves checkpoints there
        and goes on, bit by bit the same, when called again; a finished one is loaded.
    progress
        Show bars.
    resume
        False trains from the start, whatever is in ``out``.
    ranks_every
        Steps between two X-rays of the weights, for ``fullrank see run`` to show; 0 for none.
        They change nothing in the run.

    Returns
    -------
    Finetuned
        The best model, its history and its memory table.

    Raises
    ------
    InputError
        On settings that do not fit together, unfit data, a folder that holds something else or
        another run, a loss that is not finite.
    StoreError
        On a damaged checkpoint.
    KeyboardInterrupt
        After Ctrl-C, once the step is finished and a checkpoint is written.

    Examples
    --------
    >>> run = FinetuneRun.of({
    ...     "model": {"kind": "classifier", "name": "org/model"},
    ...     "data": {"source": "reviews.jsonl"},
    ...     "adapter": {"method": "eva", "rank": 8},
    ... })
    >>> finetune(run, out="tuned").history.best.metric  # doctest: +SKIP
    0.93
    """
    for library in ("transformers", "accelerate"):
        require(library, extra="hf")
    tuned: Finetuned = carried_out(
        lambda folder, processes: _Finetuning(
            config, task or _named(data), folder, processes, ranks_every
        ),
        out,
        progress=progress,
        resume=resume,
    )
    return tuned


class _Finetuning:
    """One run of the loop."""

    def __init__(
        self,
        config: FinetuneRun,
        task: MakeTask,
        folder: Path | None,
        processes: Processes,
        ranks_every: int,
    ) -> None:
        self.config, self.folder, self.processes = config, folder, processes
        self.ranks_every = ranks_every
        _check_adapter(config)
        section = config.adapter
        plan = None if section.plan is None else RankPlan.load(section.plan)
        self.device = processes.device(config.loop.device)
        processes.join(self.device)
        self.task = prepared(task, config, processes, self.device)
        self.identity: dict[str, Any] = {
            "config": config.as_dict(),
            "data": self.task.fingerprint,
            "model": weights_digest(self.task.network),
        }
        if plan is not None:
            # The settings name its file, whatever is in it.
            self.identity["plan"] = hashlib.sha256(plan.to_json().encode()).hexdigest()
        if processes.count > 1:
            self.identity["number of processes"] = processes.count
        self.start: dict[str, Any] = {}
        self.interrupted = False
        self.layers: tuple[Any, ...] = ()

    def finished(self, folder: Path) -> Finetuned:
        """Load the run that was finished in a folder, if it is this one."""
        history, memory, data = read_result(folder, self.identity)
        task = self.task
        if self.config.adapter.method != FULL:
            from fullrank.adapters.loading import put_on

            tuned = put_on(task.base, folder)
            model = trained_model(task, tuned)
        else:
            model = tuned = load_model(folder, lambda source: _again(task, source))
        return Finetuned(model.eval(), tuned, history, memory, self.config, data, (), folder)

    def run(self, progress: bool) -> Finetuned:
        """Adapt, train, keep the best weights, count memory."""
        with self.task.form():
            tuned = self._adapted(progress)
            model = trained_model(self.task, tuned)
            fitted = fit(
                self._parts(model),
                Pace.of(self.config.loop),
                identity={**self.identity, **self.start},
                folder=self.folder,
                processes=self.processes,
                device=self.device,
                progress=progress,
                ranks_every=self.ranks_every,
            )
            self.interrupted = fitted.interrupted
            counts = {
                **self.task.counts,
                "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
                "parameters": sum(p.numel() for p in model.parameters()),
            }
        history, memory = fitted.history, fitted.memory
        return Finetuned(
            model.eval(), tuned, history, memory, self.config, counts, self.layers, self.folder
        )

    def save(self, tuned: Finetuned, folder: Path) -> None:
        """Put adapter (or model), tokenizer and curves in place, then say that they are whole."""
        from fullrank.training.lm_report import write_log, write_plot

        section = self.config.adapter

        def write(staging: Path) -> None:
            if section.method == FULL:
                self.task.save_base(staging)
            elif section.as_lora:
                from fullrank.adapters import save_as_lora

                save_as_lora(tuned.tuned, staging)
            else:
                tuned.tuned.save_pretrained(str(staging))
            self.task.save_rest(staging)
            write_log(tuned.history, staging)
            write_plot(tuned.history, staging)

        values = {**tuned.to_json(), "identity": self.identity}
        put_in_place(folder, write, values, last=_needed(self.config))

    def _adapted(self, progress: bool) -> Any:
        """Put the adapter on; the same again when a run goes on."""
        tuned = adapted(self.task, self.config, progress)
        if self.config.adapter.method == FULL:
            return tuned
        self.layers = tuned.adapt_report.layers
        # Some methods change the base by what they find: a run goes on only from the same start.
        frozen = torch.nn.ParameterList(p for p in tuned.parameters() if not p.requires_grad)
        self.start = {"start of the adapter": weights_digest(frozen)}
        return tuned

    def _parts(self, model: Any) -> Parts:
        task, counted = self.task, TokenCounter()

        def trainer(workplace: Path, **given: Any) -> Any:
            from fullrank.training.finetune_trainer import FinetuneTrainer
            from fullrank.training.lm_trainer import arguments

            tuners = [
                callback
                for module in model.modules()
                for callback in getattr(module, "trainer_callbacks", list)()
            ]
            return FinetuneTrainer(
                task=task,
                counted=counted,
                autocast=task.autocast,
                model=model,
                args=arguments(self.config.loop, workplace, self.device),
                first=tuners,
                **given,
            )

        return Parts(
            model,
            task.measure,
            TrainingHistory(task.metric, lower_is_better=task.lower_is_better),
            counted,
            lambda: make_optimizer(model, self.config.optimizer),
            self.config.optimizer.name,
            trainer,
        )


def _named(data: Any) -> MakeTask:
    return lambda config, processes: make_task(config, data, processes)


def _check_adapter(config: FinetuneRun) -> None:
    """Raise on a method that there is not, before a model is loaded."""
    if config.adapter.method == FULL:
        return
    from fullrank.adapters.adapt_methods import METHODS

    require("peft", extra="adapters")
    if config.adapter.method not in METHODS:
        raise InputError(
            f"adapter.method={config.adapter.method!r}; it is {FULL} or one of {', '.join(METHODS)}"
        )


def _again(task: Task, source: str) -> Any:
    """Load a whole model that was fine-tuned."""
    return (
        type(task.network).from_pretrained(source)
        if task.network is task.base
        else (type(task.network)(source, device=str(task.network.device)))
    )


def _needed(config: FinetuneRun) -> str:
    """The file without which nothing loads what is saved."""
    if config.adapter.method != FULL:
        return "adapter_config.json"
    return "modules.json" if config.model.kind == "encoder" else "config.json"
