"""LoRA-SB: r x r adapters that start as the first update of full fine-tuning (arXiv 2411.19557).

``W = W0 + s B R A`` with B and A frozen and only the core R trained, ``r^2`` numbers a matrix
whatever its size. With orthonormal B and A and s = 1, a step of R is the best step that the weight
can make between them. Importing this module makes the type known to PEFT.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fullrank.adapters.gradients import (
    GradientSum,
    calibrating,
    check_size,
    fold_gradients,
    loss_of,
)
from fullrank.adapters.lora_sb_layer import LoraSBModel as LoraSBModel
from fullrank.adapters.lora_sb_start import Start, first_update, start_from_update
from fullrank.adapters.registration import register_tuner
from fullrank.adapters.tuner_config import TunerConfig
from fullrank.core.batches import first_rows, rows_in
from fullrank.core.errors import InputError
from fullrank.core.names import canonical_name
from fullrank.core.table import Cell, Table


@dataclass
class LoraSBConfig(TunerConfig):
    """Configuration for ``peft.get_peft_model``.

    Parameters
    ----------
    r
        Size of the core: 32 (the paper's language models 32 to 96, GLUE 24); ``r^2`` trained
        numbers a matrix. At most the shorter side of any layer.
    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save
        PEFT's. ``nn.Linear`` and ``Conv1D`` only.
    alpha
        The scaling is alpha / r; None (default) for 1, at which no scaling needs tuning.
    init
        ``"update"`` (default): :func:`initialize` sets the factors from data; before it the
        adapter adds nothing and refuses to train. ``"xs"``: LoRA-XS's, from the weight itself.
        ``"given"``: 0 until a file is loaded, as in every saved configuration.
    core_dtype
        Type of R, A and B: None (default) for the base's, and at least float32. In a narrower one
        A and B lose their orthogonality to rounding.
    dropout
        Of the adapters' inputs, 0.
    rank_pattern, alpha_pattern
        ``{pattern of a module's name: value}``, PEFT's.
    seed
        Of ``"xs"``'s R.
    bias
        ``"none"``, ``"all"`` or ``"lorasb_only"``.
    init_weights
        False starts from random factors and core; for tests.

    Raises
    ------
    InputError
        On values out of range; from ``get_peft_model`` on layers that are not linear, quantised
        (unless ``init="given"``) or narrower than r.

    Notes
    -----
    The first output is not the base's: the first update is in it. A process that loads such an
    adapter must import ``fullrank.adapters.lora_sb`` first, or PEFT does not know its type.

    Examples
    --------
    >>> import peft
    >>> config = LoraSBConfig(r=3, target_modules=["0"], init="xs")
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)
    >>> model.print_trainable_parameters()
    trainable params: 9 || all params: 37 || trainable%: 24.3243
    """

    r: int = 32
    init: Literal["update", "xs", "given"] = "update"
    core_dtype: Any = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    seed: int = 0

    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "init": ("update", "xs", "given"),
        "core_dtype": (None, "float32", "bfloat16", "float16", "float64"),
        "bias": ("none", "all", "lorasb_only"),
    }
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    def __post_init__(self) -> None:
        if self.core_dtype is not None:  # a file holds text
            self.core_dtype = str(self.core_dtype).removeprefix("torch.")
        super().__post_init__()
        self.check_whole("r", 1)

    def to_dict(self) -> dict[str, Any]:
        """Return what a file holds: the factors beside it are given, whatever they came from."""
        return {**super().to_dict(), "init": "given"}


register_tuner("fullrank_lora_sb", LoraSBConfig, LoraSBModel)


@dataclass(frozen=True)
class LoraSBReport:
    """What LoRA-SB found.

    Attributes
    ----------
    ranks
        Layer -> r.
    captured
        Layer -> share of the first update's norm that ``s B R A`` has.
    samples
        How many the gradient is the sum over, in this process.
    seconds
        Layer -> time of its decomposition.
    """

    ranks: Mapping[str, int]
    captured: Mapping[str, float]
    samples: int
    seconds: Mapping[str, float]

    def table(self) -> Table:
        """Return a row a layer."""
        rows: list[list[Cell]] = [
            [name, rank, self.captured[name], rank * rank] for name, rank in self.ranks.items()
        ]
        return Table(
            ["layer", "rank", "captured update", "trained"],
            rows,
            title=f"LoRA-SB, gradients of {self.samples} samples",
            formats={"captured update": ".1%", "trained": ",d"},
        )


def initialize(
    model: Any,
    dataloader: Iterable[Any],
    lr: float,
    n_samples: int = 50,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    adapter: str = "default",
    seed: int = 0,
    progress: bool = True,
) -> LoraSBReport:
    """Start an adapter from the first update that full fine-tuning would make.

    The gradients of the base model's loss over ``n_samples`` samples are summed for each adapted
    weight, in training mode and on the CPU; ``D = -lr sign(sum)`` is cut to rank r, and
    ``s B R A`` is that. The weights stay as they are.

    Parameters
    ----------
    model
        A ``PeftModel`` with a :class:`LoraSBConfig` adapter.
    dataloader
        Batches with labels, or whatever ``loss_fn`` takes, of the task to be learnt.
    lr
        Learning rate of the *first* optimizer step: the peak rate divided by the number of warm-up
        steps. (The official code divides by the steps of the calibration loader instead, and gets
        about a tenth.)
    n_samples
        50, about 0.1 % of the training set (the paper's arithmetic runs).
    loss_fn
        ``(model, batch) -> loss``, the mean over the batch's samples; None for the model's own.
        Batches count by their numbers of samples. A language model's loss is a mean over tokens:
        batches of one sample weigh samples alike.
    adapter
        Which adapter.
    seed
        Of dropout while gradients are taken, and of the sketch of very large matrices.
    progress
        Show a bar.

    Returns
    -------
    LoraSBReport

    Raises
    ------
    InputError
        When there is no such adapter, the loader has fewer samples, the loss is not finite, or a
        weight gets no gradient. The adapter is then as it was.

    Examples
    --------
    >>> import peft
    >>> config = LoraSBConfig(r=2, target_modules=["0"])
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)
    >>> rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    >>> found = initialize(model, rows.split(10), lr=1e-3, progress=False,
    ...                    loss_fn=lambda m, x: m(x).square().mean())
    >>> found.ranks, found.samples
    ({'0': 2}, 50)
    """
    config = getattr(model, "peft_config", {}).get(adapter)
    if not isinstance(config, LoraSBConfig):
        raise InputError(
            f"there is no LoRA-SB adapter {adapter!r}; make one with peft.get_peft_model(model, "
            "LoraSBConfig(...))"
        )
    if not 0 < lr < float("inf"):
        raise InputError(f"lr={lr!r}; it is the learning rate of the first step, positive")
    layers = dict(model.base_model.adapted(adapter))
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    sums = {name: GradientSum(torch.float32, torch.device("cpu")) for name in layers}
    batches = _samples(dataloader, n_samples)

    def summed(net: nn.Module, batch: Any) -> Tensor:
        return (loss_fn or loss_of)(net, batch) * rows_in(batch)

    with model.disable_adapter(), calibrating(model, seed):
        fold_gradients(
            model, weights, sums, batches, len(batches), loss_fn=summed, progress=progress
        )
    starts, seconds = {}, {}
    for name, layer in layers.items():
        began = time.perf_counter()
        starts[name] = _start(name, layer, sums.pop(name), lr, seed, adapter)
        seconds[canonical_name(name)] = time.perf_counter() - began
    for name, layer in layers.items():
        layer.set_start(adapter, starts[name])
    return LoraSBReport(
        {canonical_name(name): len(start.A) for name, start in starts.items()},
        {canonical_name(name): start.captured for name, start in starts.items()},
        n_samples,
        seconds,
    )


def _samples(data: Iterable[Any], count: int) -> list[Any]:
    """Batches of so many samples in all; the last one may be cut."""
    if count < 1:
        raise InputError(f"n_samples={count}; at least one is needed")
    batches, missing = [], count
    for batch in data:
        batches.append(first_rows(batch, missing))
        missing -= rows_in(batches[-1])
        if not missing:
            return batches
    raise InputError(
        f"the data loader has {count - missing} samples, fewer than n_samples={count}; give more "
        "of them, or a smaller n_samples"
    )


def _start(name: str, layer: Any, total: GradientSum, lr: float, seed: int, adapter: str) -> Start:
    gradient = layer.oriented(total.mean(1))
    check_size(name, float(torch.linalg.vector_norm(gradient)))
    return start_from_update(
        first_update(gradient, lr), layer.r[adapter], layer.scaling[adapter], seed
    )
