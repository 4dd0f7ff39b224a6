"""`train_lm`: pre-train or fine-tune a causal language model with any optimizer."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fullrank.core.errors import InputError, require
from fullrank.datasets.texts import Texts, read_texts
from fullrank.training.checkpoints import weights_digest
from fullrank.training.fit import Pace, Parts, TokenCounter, carried_out, fit
from fullrank.training.history import TrainingHistory
from fullrank.training.lm_config import LMTraining
from fullrank.training.lm_data import (
    BYTES,
    LMData,
    bits_per_byte,
    check_vocabulary,
    load_lm,
    read_tokenizer,
)
from fullrank.training.lm_optimizers import make_optimizer
from fullrank.training.optimizers import StateMemory
from fullrank.training.processes import Processes
from fullrank.training.quiet import precision_of
from fullrank.training.results import put_in_place, read_result, versions

METRIC = "bits per byte"


@dataclass(frozen=True)
class TrainedLM:
    """A trained language model and how it came about.

    Attributes
    ----------
    model
        The transformers model with the best weights, in evaluation mode.
    tokenizer
        Its tokenizer.
    history
        Loss curve, bits per byte at each evaluation, speed.
    memory
        Peak bytes of the optimizer's state against AdamW's.
    config
        The run's settings.
    data
        Counts of what it was trained on.
    folder
        Where it is saved, or None.
    """

    model: Any
    tokenizer: Any
    history: TrainingHistory
    memory: StateMemory
    config: LMTraining
    data: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return everything but the model as JSON values: what ``training.json`` holds."""
        best = self.history.best
        return {
            "version": 1,
            "config": self.config.as_dict(),
            "data": self.data,
            "history": self.history.to_json(),
            "best": None if best is None else {"step": best.step, METRIC: best.metric},
            "tokens_per_second": self.history.tokens_per_second,
            "memory": self.memory.to_json(),
            "versions": versions(),
        }


def train_lm(
    config: LMTraining,
    *,
    texts: Texts | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    resume: bool = True,
    ranks_every: int = 0,
) -> TrainedLM:
    """Train a causal language model as a run's settings say, and keep its best weights.

    Parameters
    ----------
    config
        Model, data, optimizer and loop; see :class:`LMTraining`.
    texts
        What to train on, instead of ``config.data.source``.
    out
        New folder for the model, its tokenizer, ``training.json``, ``log.jsonl`` and a plot. An
        interrupted run leaves checkpoints there and goes on, bit by bit the same, when called
        again; a finished one is loaded.
    progress
        Show a bar with the time left.
    resume
        False trains from the start, whatever is in ``out``.
    ranks_every
        Steps between two X-rays of the weights, for ``fullrank see run`` to show; 0 for none.
        They change nothing in the run.

    Returns
    -------
    TrainedLM
        The best model, its history and its memory table.

    Raises
    ------
    InputError
        On settings that do not fit together, too little text, a folder that holds something else
        or another run, a loss that is not finite.
    StoreError
        On a damaged checkpoint.
    KeyboardInterrupt
        After Ctrl-C, once the step is finished and a checkpoint is written.

    Examples
    --------
    >>> tiny = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
    ...         "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> run = LMTraining.of({
    ...     "model": {"config": tiny},
    ...     "data": {"context": 16},
    ...     "optimizer": {"name": "galore_adamw", "rank": 4},
    ...     "loop": {"steps": 4, "batch_size": 2, "evaluations": 1},
    ... })
    >>> trained = train_lm(run, texts=Texts.divided("abc", ["abc " * 200]), progress=False)
    >>> trained.history.stopped
    'steps'
    """
    for library in ("transformers", "accelerate"):
        require(library, extra="hf")
    trained: TrainedLM = carried_out(
        lambda folder, processes: _Training(config, texts, folder, processes, ranks_every),
        out,
        progress=progress,
        resume=resume,
    )
    return trained


class _Training:
    """One run of the loop."""

    def __init__(
        self,
        config: LMTraining,
        texts: Texts | None,
        folder: Path | None,
        processes: Processes,
        ranks_every: int,
    ) -> None:
        section = config.data
        self.config, self.folder, self.processes = config, folder, processes
        self.ranks_every = ranks_every
        if processes.count > 1 and config.optimizer.per_layer:
            raise InputError(
                "optimizer.per_layer takes gradients before the processes have averaged them; "
                "leave it out, or train in one process"
            )
        self.device = processes.device(config.loop.device)
        processes.join(self.device)
        self.texts = texts or read_texts(section.source, field_name=section.field)
        self.tokenizer = read_tokenizer(section.tokenizer or config.model.name or BYTES)
        self.data = LMData.of(self.texts, self.tokenizer, section.context, section.dev_bytes)
        self.identity: dict[str, Any] = {
            "config": config.as_dict(),
            "data": self.texts.fingerprint,
        }
        if config.model.name is not None:
            self.identity["model"] = weights_digest(self.model)
        if processes.count > 1:
            self.identity["number of processes"] = processes.count
        self.interrupted = False

    def finished(self, folder: Path) -> TrainedLM:
        """Load the run that was finished in a folder, if it is this one."""
        history, memory, data = read_result(folder, self.identity)
        model = load_lm(str(folder), None, self.tokenizer, self.config.model.dtype).eval()
        return TrainedLM(model, self.tokenizer, history, memory, self.config, data, folder)

    def run(self, progress: bool) -> TrainedLM:
        """Train, keep the best weights, count memory."""
        fitted = fit(
            self._parts(),
            Pace.of(self.config.loop),
            identity=self.identity,
            folder=self.folder,
            processes=self.processes,
            device=self.device,
            progress=progress,
            ranks_every=self.ranks_every,
        )
        self.interrupted = fitted.interrupted
        return TrainedLM(
            self.model.eval(),
            self.tokenizer,
            fitted.history,
            fitted.memory,
            self.config,
            self._counts(self.model),
            self.folder,
        )

    def save(self, trained: TrainedLM, folder: Path) -> None:
        """Put model, tokenizer and curves in place, then say that they are whole."""
        from fullrank.training.lm_report import write_log, write_plot

        def write(staging: Path) -> None:
            trained.model.save_pretrained(str(staging))
            trained.tokenizer.save_pretrained(str(staging))
            write_log(trained.history, staging)
            write_plot(trained.history, staging)

        values = {**trained.to_json(), "identity": self.identity}
        put_in_place(folder, write, values, last="config.json")

    @functools.cached_property
    def model(self) -> Any:
        """The model at the start; at random it depends on the seed alone."""
        section, loop = self.config.model, self.config.loop
        torch.manual_seed(loop.seed)
        model = load_lm(section.name, section.config, self.tokenizer, section.dtype)
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and self.config.data.context > limit:
            raise InputError(
                f"data.context={self.config.data.context}, but the model takes {limit} tokens"
            )
        check_vocabulary(model, self.data.largest)
        if section.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model.to(self.device)

    def _parts(self) -> Parts:
        config, model = self.config, self.model
        autocast = precision_of(config.loop.precision, model.device)
        counted = TokenCounter()

        def measure(model: Any) -> tuple[float, None]:
            size = 4 * config.loop.batch_size
            return bits_per_byte(model, self.data, size, autocast, self.processes), None

        def trainer(workplace: Path, **given: Any) -> Any:
            from fullrank.training.lm_trainer import LMTrainer, arguments

            return LMTrainer(
                counted=counted,
                autocast=autocast,
                model=model,
                args=arguments(config.loop, workplace, model.device),
                train_dataset=self.data.train,
                **given,
            )

        return Parts(
            model,
            measure,
            TrainingHistory(METRIC, lower_is_better=True),
            counted,
            lambda: make_optimizer(model, config.optimizer),
            config.optimizer.name,
            trainer,
            self._stepping,
        )

    def _stepping(self, optimizer: Any) -> AbstractContextManager[Any]:
        """A step a layer in the backward pass, where that is wanted."""
        if not self.config.optimizer.per_layer:
            return nullcontext()
        from fullrank.optim import step_per_layer

        return step_per_layer(optimizer, self.config.loop.accumulation)

    def _counts(self, model: Any) -> dict[str, Any]:
        return {
            "name": self.texts.name,
            "fingerprint": self.texts.fingerprint,
            "manifest": dict(self.texts.manifest),
            "train_tokens": len(self.data.train.ids),
            "dev_tokens": len(self.data.dev.ids),
            "bytes_per_token": self.data.bytes_per_token,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
