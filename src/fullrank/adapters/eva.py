"""EVA: adapters that begin where a layer's inputs vary most, with ranks where they are needed.

LoRA's ``A`` starts as the leading principal components of what flows into the layer, and the
budget of ranks goes to the layers whose components explain most (arXiv 2410.07170). The adapter
stays PEFT's: this computes the state that PEFT's own ``initialize_lora_eva_weights`` loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fullrank.adapters.eva_report import EvaReport as EvaReport
from fullrank.adapters.eva_search import Search
from fullrank.adapters.eva_search import Solver as Solver
from fullrank.adapters.layer_inputs import keep_dtype, lora_layers, token_mask
from fullrank.adapters.lora_files import exact_targets, exactly
from fullrank.core.batches import call
from fullrank.core.errors import InputError, require

_PREFIX = "base_model.model."


def initialize(
    model: nn.Module,
    dataloader: Iterable[Any],
    adapter_name: str = "default",
    method: Solver = "gram",
    *,
    center: bool = True,
    max_batches: int = 64,
    min_tokens: int = 0,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    token_mask_fn: Callable[[Any], Tensor | None] | None = None,
    progress: bool = True,
) -> EvaReport:
    """Initialise a PEFT model's LoRA adapter by EVA.

    Parameters
    ----------
    model
        A ``PeftModel`` with a LoRA adapter, best made with
        ``LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(...))`` and
        ``get_peft_model(..., low_cpu_mem_usage=True)``. Of ``EvaConfig``, ``rho``, ``tau``,
        ``use_label_mask``, ``whiten`` and ``adjust_scaling_factors`` count.
    dataloader
        Batches: mappings of the model's arguments, or anything that ``forward_fn`` takes.
    adapter_name
        Which adapter.
    method
        ``"gram"``: second moments of all inputs, decomposed once: exact, and the same for any
        order and size of batches; one pass over the data. ``"ipca"``: PEFT's incremental way,
        cycling until components stay where they are; also taken for inputs wider than 8192.
    center
        Subtract the mean (PEFT and official code). The bound on the gradient in the paper is of
        uncentred inputs. ``"ipca"`` always does.
    max_batches
        No more forward passes than that.
    min_tokens
        Fewest tokens that each layer has to see; never fewer than its components.
    forward_fn
        ``(model, batch)``; by default ``model(**batch)``.
    token_mask_fn
        Batch -> ``(batch, length)`` mask of the tokens that count, or None for all; by default
        those with attention, and with a label where there are labels.
    progress
        Show a bar.

    Returns
    -------
    EvaReport
        Ranks, explained variance and a :class:`~fullrank.core.RankPlan`.

    Raises
    ------
    InputError
        When there is no such adapter or no layer EVA can initialise, a rank is above what a layer
        allows, the loader is empty, or its samples are fewer than the components or
        ``min_tokens``.

    Warns
    -----
    UserWarning
        When ``"ipca"`` ended before all components stayed where they were.

    Examples
    --------
    >>> from fullrank.adapters import eva
    >>> report = eva.initialize(peft_model, loader)  # doctest: +SKIP
    >>> report.table()  # doctest: +SKIP
    """
    peft = require("peft", extra="adapters")
    if method not in ("gram", "ipca"):
        raise InputError(f"method={method!r}; it is 'gram' or 'ipca'")
    if max_batches < 1:
        raise InputError(f"max_batches={max_batches}; at least one is needed")
    layers = lora_layers(model, adapter_name)
    config: Any = model.peft_config[adapter_name]  # type: ignore[index]
    options = config.eva_config or peft.EvaConfig()
    search = Search(model, layers, adapter_name, options, method, center)
    mask_of = token_mask_fn or (
        lambda batch: token_mask(batch, labels=bool(options.use_label_mask))
    )
    search.collect(dataloader, max_batches, forward_fn or call, mask_of, progress)
    search.check_counts(min_tokens)
    ranks = search.allot()
    state = search.weights(ranks, bool(options.whiten))
    if config.eva_config is None:
        config.eva_config = options
    scalings = {name: layer.scaling[adapter_name] for name, layer in layers.items()}
    _load(model, layers, adapter_name, state, ranks)
    if config.use_rslora and options.adjust_scaling_factors:
        changed = [name for name, rank in ranks.items() if rank and rank != search.start[name]]
        for name in changed:  # PEFT's alpha is for alpha / r
            layers[name].scaling[adapter_name] = scalings[name]
            alpha = layers[name].lora_alpha[adapter_name] = scalings[name] * ranks[name] ** 0.5
            config.alpha_pattern[name.removeprefix(_PREFIX)] = alpha
    _name_exactly(model, config, [name for name, rank in ranks.items() if rank])
    return search.report(ranks)


def _load(
    model: nn.Module,
    layers: Mapping[str, Any],
    adapter: str,
    state: Mapping[str, Tensor],
    ranks: Mapping[str, int],
) -> None:
    """Have PEFT give the layers their ranks, and the adapter its weights as they are."""
    peft = require("peft", extra="adapters")
    dtypes = {name: layer.lora_A[adapter].weight.dtype for name, layer in layers.items()}
    peft.initialize_lora_eva_weights(model, eva_state_dict=dict(state), adapter_name=adapter)
    for name in state:
        if ranks[name]:  # PEFT's loader rounds to the base's type
            keep_dtype(layers[name], adapter, dtypes[name])
            layers[name].lora_A[adapter].weight.data.copy_(state[name])


def _name_exactly(model: nn.Module, config: Any, kept: list[str]) -> None:
    """Have the adapter's configuration name these layers and no other, as PEFT matches names."""
    for pattern in ("rank_pattern", "alpha_pattern"):  # PEFT's keys also fit longer names
        values = getattr(config, pattern)
        setattr(config, pattern, {exactly(name): value for name, value in values.items()})
    kept = [name.removeprefix(_PREFIX) for name in kept]
    names = [name.removeprefix(_PREFIX) for name, _ in model.named_modules()]
    others = [name for name in names if ".base_layer" not in name and ".lora_" not in name]
    targets = exact_targets(kept, others)
    if isinstance(targets, str) and set(config.target_modules) <= set(kept):
        config.target_modules = targets
