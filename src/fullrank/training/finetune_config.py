"""`FinetuneRun`: a fine-tuning run as a file says it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fullrank.training.lm_config import LoopSection, OptimizerSection, RunSettings, Section

FULL = "full"
"""The method that puts no adapter on: every weight is trained."""


class BaseSection(Section):
    """What is fine-tuned.

    Parameters
    ----------
    kind
        ``"lm"``: a causal language model; ``"classifier"``: a text classifier; ``"encoder"``: a
        sentence-transformers encoder for retrieval.
    name
        A folder or a Hugging Face name.
    dtype
        Of the base's weights. Adapters are float32.
    """

    kind: Literal["lm", "classifier", "encoder"] = "lm"
    name: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False


class TuningData(Section):
    """What it is fine-tuned on.

    Parameters
    ----------
    source
        Language model: as :func:`~fullrank.datasets.read_texts`; JSONL whose lines have
        ``prompt`` and ``completion`` trains on completions only. Classifier: JSONL with ``text``
        and ``label``. A folder with ``train.jsonl`` and ``dev.jsonl`` is taken in these parts,
        of a file the last tenth (language model) or a drawn one (classifier) is held out.
        Encoder: as ``fullrank train encoder``: pydocs, cranfield, a BEIR folder, ...
    text, label, prompt, completion
        Names of the fields.
    max_tokens
        Tokens of a text, the rest is cut off.
    dev_bytes
        Of plain text, how much of the dev part to measure on, about.
    hard_negatives, metric, dev_queries, dev_documents
        Encoder: see :class:`~fullrank.training.EncoderTraining`.
    """

    source: str
    text: str = "text"
    label: str = "label"
    prompt: str = "prompt"
    completion: str = "completion"
    max_tokens: int = Field(default=256, ge=8)
    dev_bytes: int = Field(default=100_000, ge=1000)
    hard_negatives: int = Field(default=1, ge=0)
    metric: str = "nDCG@10"
    dev_queries: int = Field(default=1000, ge=1)
    dev_documents: int = Field(default=1000, ge=1)


class AdapterSection(Section):
    """What is trained beside, or instead of, the base's weights.

    Parameters
    ----------
    method
        One of :func:`fullrank.adapters.adapt`'s, or ``"full"`` for no adapter.
    rank, alpha, dropout, targets, options
        As :func:`~fullrank.adapters.adapt`; ``options`` are the method's own.
    plan
        File of a :class:`~fullrank.core.RankPlan`, instead of ``rank``.
    as_lora
        Save an ordinary LoRA, which loads without this package.
    """

    method: str = "lora"
    rank: int | None = Field(default=None, ge=1)
    plan: str | None = None
    alpha: float | None = Field(default=None, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | list[str] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    as_lora: bool = False

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.rank is not None and self.plan is not None:
            raise ValueError("give a rank or a plan, not both")
        given = self.model_fields_set - {"method"}
        if self.method == FULL and given:
            raise ValueError(f"method: full has no adapter; leave out {', '.join(sorted(given))}")
        return self


class FinetuneRun(RunSettings):
    """A run: model, data, adapter, optimizer, loop.

    Raises
    ------
    InputError
        From :meth:`read` and :meth:`of`, naming every value that makes no sense.

    Examples
    --------
    >>> run = FinetuneRun.of(
    ...     {"model": {"name": "base"}, "data": {"source": "notes.txt"}}, ["adapter.method=eva"])
    >>> run.adapter.method, run.optimizer.name, run.loop.steps
    ('eva', 'adamw', 1000)
    """

    model: BaseSection
    data: TuningData
    adapter: AdapterSection = AdapterSection()
    optimizer: OptimizerSection = OptimizerSection()
    loop: LoopSection = LoopSection()

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.optimizer.per_layer:
            raise ValueError("optimizer.per_layer is for train lm; leave it out")
        if self.model.kind == "encoder" and self.loop.batch_size < 2:
            raise ValueError("loop.batch_size is at least 2: a batch of one pair has no negatives")
        return self
