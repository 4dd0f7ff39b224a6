"""LoRD: one-shot, data-aware low-rank decomposition.

Kaushal, Vaidhya, Rish: "LORD: Low Rank Decomposition of Monolingual Code LLMs for One-Shot
Compression", 2023, arXiv 2309.14021. Each layer's factors are the principal components of what
it puts out on calibration text (atomic feature mimicking, Yu & Wu, AAAI 2023): of all affine
maps of that rank they have the least squared error there. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fullrank.compress.allocation import Budget
from fullrank.compress.batches import Batches
from fullrank.compress.calibration import CalibrationStats
from fullrank.compress.factorization import factorize
from fullrank.compress.planning import layer_spectra, make_plan
from fullrank.compress.report import report
from fullrank.compress.targets import factorisable
from fullrank.core.errors import InputError
from fullrank.core.plan import RankPlan
from fullrank.core.rank_rules import PerKind
from fullrank.core.table import Table


@dataclass(frozen=True)
class LoRDConfig:
    """How to decompose.

    Parameters
    ----------
    ranks
        Name pattern -> rank, one for each kind of layer (the paper's choice). Either this or
        ``budget``.
    budget
        Share of the parameters of the targeted layers to keep, in (0, 1]; ranks are then chosen
        so that the summed relative error of the layers' outputs is least. (The paper chooses
        ranks by a perplexity scan; :func:`~fullrank.compress.shrink` does that for any metric.)
    target_modules, exclude
        Name patterns; by default every linear layer but the output head, and every convolution
        (whose outputs at all places are its samples; not in the paper).
    method
        ``"output_pca"`` (the method) or ``"svd"`` (the baseline it beats).
    rank_multiple
        Ranks chosen for a budget are multiples of this, so that tiles of the matrix units stay
        full: 128 in the paper, for layers of thousands of features. Layers with fewer than 8
        times as many use an eighth of their width.
    sequential
        Statistics of each layer after the layers before it are replaced; the original model's
        for all (one pass) by default.
    batch_size, max_length
        Of calibration texts.
    """

    ranks: Mapping[str, int] | None = None
    budget: float | None = None
    target_modules: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    method: Literal["output_pca", "svd"] = "output_pca"
    rank_multiple: int = 128
    sequential: bool = False
    batch_size: int = 32
    max_length: int | None = None

    def __post_init__(self) -> None:
        if (self.ranks is None) == (self.budget is None):
            raise InputError("LoRDConfig takes either ranks= or budget=")
        if self.ranks is not None and not self.ranks:
            raise InputError("LoRDConfig got an empty ranks=, which leaves every layer dense")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise InputError(f"budget {self.budget}; it is a share in (0, 1]")
        if self.method not in ("output_pca", "svd"):
            raise InputError(f"method {self.method!r}; it is 'output_pca' or 'svd'")
        if self.rank_multiple < 1:
            raise InputError(f"rank_multiple {self.rank_multiple}; it is at least 1")


def lord_compress(
    model: nn.Module,
    data: Iterable[Any],
    config: LoRDConfig,
    *,
    tokenizer: Callable[..., Any] | None = None,
    progress: bool = True,
) -> tuple[nn.Module, Table]:
    """Decompose a model's layers in one pass over calibration data, in place.

    Parameters
    ----------
    model
        A SentenceTransformer, a transformers model or any module.
    data
        Calibration texts or batches: the paper uses a few hundred sequences of the domain.
    config
        Ranks or a budget.
    tokenizer
        For texts, unless the model brings its own.
    progress
        Show a bar.

    Returns
    -------
    model, report
        The same model, and a table with each layer's rank, size and relative output error.

    Raises
    ------
    InputError
        On data that is empty, constant or not finite, or a pattern that matches nothing.

    Examples
    --------
    >>> import torch
    >>> model, data = nn.Sequential(nn.Linear(32, 32)), [torch.randn(400, 32)]
    >>> model, table = lord_compress(model, data, LoRDConfig(ranks={"0": 4}), progress=False)
    >>> table.rows[0][:2]
    ['0', 4]
    """
    # Statistics for the plan, then once more for every layer.
    passes = list(data) if config.sequential and isinstance(data, Iterator) else data
    batches = Batches(
        model,
        passes,
        batch_size=config.batch_size,
        max_length=config.max_length,
        tokenizer=tokenizer,
    )
    plan, stats = _plan(model, batches, config, progress)
    calibration = batches if config.sequential else stats
    factorize(model, plan, calibration, sequential=config.sequential, progress=progress)
    return model, report(model)


def _plan(
    model: nn.Module, batches: Batches, config: LoRDConfig, progress: bool
) -> tuple[RankPlan, CalibrationStats]:
    include, exclude = config.target_modules or None, config.exclude
    targets = factorisable(model, include, exclude)
    stats = CalibrationStats(targets).observe(model, batches, progress=progress)
    spectra = layer_spectra(
        model, include=include, exclude=exclude, stats=stats, method=config.method
    )
    rule = (
        PerKind(config.ranks)
        if config.ranks
        else Budget(config.budget or 1.0, config.rank_multiple)
    )
    plan = make_plan(model, rule, include, exclude, stats, method=config.method, spectra=spectra)
    return plan, stats
