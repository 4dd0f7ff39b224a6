"""`train_lm`: pre-train or fine-tune a causal language model with any optimizer."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fullrank.core.errors import InputError, require
from fullrank.core.progress import progress as progress_bar
from fullrank.datasets.texts import Texts, read_texts
from fullrank.training.checkpoints import CHECKPOINTS, weights_digest
from fullrank.training.history import TrainingHistory
from fullrank.training.interrupt import Interrupt
from fullrank.training.lm_config import LMTraining
from fullrank.training.lm_data import BYTES, LMData, bits_per_byte, load_lm, read_tokenizer
from fullrank.training.lm_optimizers import make_optimizer
from fullrank.training.optimizers import StateMemory, measure_state
from fullrank.training.processes import Processes, SharedClock
from fullrank.training.quiet import own_randomness, precision_of, quiet_libraries
from fullrank.training.results import (
    RESULT,
    checked_folder,
    put_in_place,
    read_result,
    versions,
)
from fullrank.training.schedule import TimeBox

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
    folder = None if out is None else checked_folder(Path(out))
    processes = Processes()
    with quiet_libraries(), own_randomness():
        training = _Training(config, texts, folder, processes)
        with processes.main_first() as main:
            if main and folder is not None and not resume:
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
                (folder / RESULT).unlink(missing_ok=True)
        if folder is not None and (folder / RESULT).is_file():
            return training.finished(folder)
        trained = training.run(progress and processes.main)
        with processes.main_first() as main:
            if main and folder is not None:
                _save(trained, folder, training.identity)
    if training.interrupted:
        raise KeyboardInterrupt
    return trained


class _Training:
    """One run of the loop."""

    def __init__(
        self, config: LMTraining, texts: Texts | None, folder: Path | None, processes: Processes
    ) -> None:
        section = config.data
        self.config, self.folder, self.processes = config, folder, processes
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
        from fullrank.training.loop import load_weights, run

        model = self.model
        with ExitStack() as stack:
            workplace = self.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            interrupt = stack.enter_context(Interrupt(self.folder is not None))
            clock = SharedClock(self.processes, self.device, lambda: interrupt.wanted)
            advance = stack.enter_context(progress_bar("train", 100, progress, unit="%"))
            trainer, loop, checkpoint = self._trainer(model, workplace, advance, clock)
            if self.config.optimizer.per_layer:
                from fullrank.optim import step_per_layer

                hooks = step_per_layer(trainer.optimizer, self.config.loop.accumulation)
                stack.enter_context(hooks)
            run(trainer, loop, checkpoint, clock)
            self.interrupted = interrupt.wanted
            memory = measure_state(trainer.optimizer, model, self.config.optimizer.name, loop.peak)
        load_weights(model, loop.best)
        model.zero_grad(set_to_none=True)
        return TrainedLM(
            model.eval(),
            self.tokenizer,
            loop.history,
            memory,
            self.config,
            self._counts(model),
            self.folder,
        )

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
        if section.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model.to(self.device)

    def _trainer(
        self, model: Any, workplace: Path, advance: Callable[[int], None], clock: SharedClock
    ) -> tuple[Any, Any, Path | None]:
        """Put the parts together; return trainer, our callback and the checkpoint to go on from."""
        from fullrank.training.lm_trainer import LMTrainer, arguments
        from fullrank.training.loop import Loop, continue_from

        config = self.config.loop
        autocast = precision_of(config.precision, model.device)
        box = TimeBox(
            config.steps, config.seconds, warmup=config.warmup, decay=config.decay, clock=clock
        )
        counted = _Tokens()

        def measure(model: Any) -> tuple[float, None]:
            size = 4 * config.batch_size
            return bits_per_byte(model, self.data, size, autocast, self.processes), None

        loop = Loop(
            box,
            measure,
            TrainingHistory(METRIC, lower_is_better=True),
            counted,
            evaluations=config.evaluations,
            patience=config.patience,
            saves=self.folder is not None,
            advance=advance,
            clock=clock,
        )
        checkpoint = continue_from(loop, workplace, self.identity)
        optimizer = make_optimizer(model, self.config.optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, box.factor)
        trainer = LMTrainer(
            loop=loop,
            identity=self.identity,
            counted=counted,
            autocast=autocast,
            model=model,
            args=arguments(config, workplace, model.device),
            train_dataset=self.data.train,
            optimizers=(optimizer, schedule),
        )
        return trainer, loop, checkpoint

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


@dataclass
class _Tokens:
    tokens: int = 0


def _save(trained: TrainedLM, folder: Path, identity: dict[str, Any]) -> None:
    """Put model, tokenizer and curves in place, then say that they are whole."""
    from fullrank.training.lm_report import write_log, write_plot

    def write(staging: Path) -> None:
        trained.model.save_pretrained(str(staging))
        trained.tokenizer.save_pretrained(str(staging))
        write_log(trained.history, staging)
        write_plot(trained.history, staging)

    values = {**trained.to_json(), "identity": identity}
    put_in_place(folder, write, values, last="config.json")
