"""The model of a fine-tuning run with its adapter put on, ready to be stepped."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from fullrank.core.plan import RankPlan
from fullrank.training.finetune_config import FULL, FinetuneRun
from fullrank.training.finetune_tasks import Task
from fullrank.training.processes import Processes
from fullrank.training.quiet import precision_of
from fullrank.training.schedule import TimeBox

MakeTask = Callable[[FinetuneRun, Processes], Task]
"""Makes what is fine-tuned, from a run's settings and the processes that train together."""


def prepared(make: MakeTask, run: FinetuneRun, processes: Processes, device: torch.device) -> Task:
    """Make a task, with its network where and as it is trained."""
    torch.manual_seed(run.loop.seed)
    task = make(run, processes)
    task.network.to(device)
    task.autocast = precision_of(run.loop.precision, device)
    if run.model.gradient_checkpointing:
        task.base.gradient_checkpointing_enable({"use_reentrant": False})
    return task


def adapted(task: Task, run: FinetuneRun, progress: bool) -> Any:
    """Put a run's adapter on a task's base; return the ``PeftModel``, or the base without one.

    What the method starts from (activations, gradients) is taken of the task. The same settings
    give the same adapter.
    """
    section = run.adapter
    torch.manual_seed(run.loop.seed)
    if section.method == FULL:
        return task.base
    from fullrank.adapters import adapt
    from fullrank.adapters.adapt_methods import METHODS
    from fullrank.adapters.export import updates_and_biases

    method, options = METHODS[section.method], dict(section.options)
    if "lr" in inspect.signature(method.start).parameters:
        # Of the first step, which such a method starts from.
        options.setdefault("lr", _first_rate(run))
    sources = {"activations": task.inputs, "gradients": task.calibration}
    tuned = adapt(
        task.base,
        section.method,
        plan=None if section.plan is None else RankPlan.load(section.plan),
        rank=section.rank,
        data=sources[method.needs]() if method.needs in sources else None,
        targets=section.targets,
        alpha=section.alpha,
        dropout=section.dropout,
        task_type=task.task_type,
        loss_fn=task.loss,
        seed=run.loop.seed,
        progress=progress,
        **options,
    )
    if section.as_lora:
        updates_and_biases(tuned)  # what cannot be saved so says so before it is trained
    if run.model.gradient_checkpointing:
        task.base.enable_input_require_grads()
    return tuned


def _first_rate(run: FinetuneRun) -> float:
    loop = run.loop
    box = TimeBox(loop.steps, loop.seconds, warmup=loop.warmup, decay=loop.decay)
    return run.optimizer.lr * box.factor(0)


def trained_model(task: Task, tuned: Any) -> Any:
    """Return what is run in a step: an encoder around its adapted base, or the adapted model."""
    return task.network if task.network is not task.base else tuned
