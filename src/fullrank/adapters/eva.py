"""EVA: adapters that begin where a layer's inputs vary most, with ranks where they are needed.

LoRA's ``A`` starts as the leading principal components of what flows into the layer, and the
budget of ranks goes to the layers whose components explain most (arXiv 2410.07170). The adapter
stays PEFT's: this computes the state that PEFT's own ``initialize_lora_eva_weights`` loads.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullrank.adapters.eva_components import Components, GramComponents, IncrementalComponents
from fullrank.adapters.eva_report import EvaReport as EvaReport
from fullrank.adapters.layer_inputs import (
    keep_dtype,
    lora_layers,
    same_inputs,
    token_mask,
    watch_inputs,
)
from fullrank.adapters.lora_files import exact_targets, exactly
from fullrank.core.batches import call, device_of, moved
from fullrank.core.errors import InputError, require
from fullrank.core.modes import evaluating
from fullrank.core.names import canonical_name, model_fingerprint
from fullrank.core.progress import progress as progress_bar

Method = Literal["gram", "ipca"]

# Above this width an n x n matrix of second moments costs more than the incremental way.
_WIDEST = 8192


def initialize(
    model: nn.Module,
    dataloader: Iterable[Any],
    adapter_name: str = "default",
    method: Method = "gram",
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
    search = _Search(model, layers, adapter_name, options, method, center)
    mask_of = token_mask_fn or (
        lambda batch: token_mask(batch, labels=bool(options.use_label_mask))
    )
    search.collect(dataloader, max_batches, forward_fn or call, mask_of, progress)
    search.check_counts(min_tokens)
    ranks = search.allot()
    state = search.weights(ranks, bool(options.whiten))
    if config.eva_config is None:
        config.eva_config = options
    dtypes = {name: layer.lora_A[adapter_name].weight.dtype for name, layer in layers.items()}
    scalings = {name: layer.scaling[adapter_name] for name, layer in layers.items()}
    peft.initialize_lora_eva_weights(model, eva_state_dict=dict(state), adapter_name=adapter_name)
    for name in state:
        if ranks[name]:  # PEFT's loader rounds to the base's type
            keep_dtype(layers[name], adapter_name, dtypes[name])
            layers[name].lora_A[adapter_name].weight.data.copy_(state[name])
    prefix = "base_model.model."
    if config.use_rslora and options.adjust_scaling_factors:
        for name, rank in ranks.items():
            if rank and rank != search.start[name]:  # PEFT's alpha is for alpha / r
                layers[name].scaling[adapter_name] = scalings[name]
                alpha = layers[name].lora_alpha[adapter_name] = scalings[name] * rank**0.5
                config.alpha_pattern[name.removeprefix(prefix)] = alpha
    for pattern in ("rank_pattern", "alpha_pattern"):  # PEFT's keys also fit longer names
        values = getattr(config, pattern)
        setattr(config, pattern, {exactly(name): value for name, value in values.items()})
    kept = [name.removeprefix(prefix) for name, rank in ranks.items() if rank]
    names = [name.removeprefix(prefix) for name, _ in model.named_modules()]
    targets = exact_targets(
        kept, [n for n in names if ".base_layer" not in n and ".lora_" not in n]
    )
    if isinstance(targets, str) and set(config.target_modules) <= set(kept):
        config.target_modules = targets
    return search.report(ranks)


class _Search:
    """Collects inputs, allots ranks, makes the weights."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, Any],
        adapter: str,
        options: Any,
        method: Method,
        center: bool,
    ) -> None:
        self.model, self.layers, self.options = model, layers, options
        self.method, self.center = method, center
        self.start = {name: int(layer.r[adapter]) for name, layer in layers.items()}
        self.most = {name: round(rank * options.rho) for name, rank in self.start.items()}
        for name, layer in layers.items():
            bound = min(layer.in_features, layer.out_features)
            if self.start[name] > bound:
                raise InputError(
                    f"{canonical_name(name)} has rank {self.start[name]}, but its weight is only "
                    f"{layer.out_features} x {layer.in_features}; use a rank of at most {bound}"
                )
            self.most[name] = min(self.most[name], bound)
        self.limits = dict(self.most)
        self.seconds = dict.fromkeys(layers, 0.0)
        self.owner: dict[str, str] = {}
        self.found: dict[str, Components] = {}
        self.passes = 0
        self.unconverged: tuple[str, ...] = ()

    # -- inputs ------------------------------------------------------------------------------

    def collect(
        self,
        data: Iterable[Any],
        limit: int,
        forward: Callable[[nn.Module, Any], Any],
        mask_of: Callable[[Any], Tensor | None],
        progress: bool,
    ) -> None:
        """Run the base model over the data and take in what flows into each layer."""
        model: Any = self.model
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(model.disable_adapter())
            advance = stack.enter_context(progress_bar("EVA", limit, progress, "batches"))
            for number, batch in enumerate(self._batches(data, limit)):
                if not number and self._group(batch, forward, mask_of):
                    advance(1)
                    continue
                wanted = self._moving()
                if not wanted:
                    break
                self._pass(batch, wanted, forward, mask_of)
                advance(1)
        if not self.passes:
            raise InputError("the data loader is empty; EVA needs at least one batch")

    def _batches(self, data: Iterable[Any], limit: int) -> Iterable[Any]:
        """One pass for moments; again and again for the incremental way, never for ever."""
        cycles = any(isinstance(c, IncrementalComponents) for c in self.found.values())
        cycles = cycles or self.method == "ipca"
        taken = 0
        while taken < limit:
            before = taken
            for batch in data:
                yield batch
                taken += 1
                if taken == limit:
                    return
            if not cycles or taken == before:
                return

    def _group(
        self,
        batch: Any,
        forward: Callable[[nn.Module, Any], Any],
        mask_of: Callable[[Any], Tensor | None],
    ) -> bool:
        """Find layers with the same input, of which one is watched; whether the batch was used."""
        batch = moved(batch, device_of(self.model))
        once = all(self._by_moments(layer) for layer in self.layers.values())

        def start(name: str, x: Tensor) -> None:
            self.found.setdefault(name, self._components(name))
            self._add(name, x)

        self.owner = same_inputs(
            self.model, self.layers, batch, forward, mask_of(batch), start if once else None
        )
        owners = [name for name, owner in self.owner.items() if name == owner]
        for name, owner in self.owner.items():
            self.most[owner] = max(self.most[owner], self.most[name])
        self.found = {name: self.found.get(name) or self._components(name) for name in owners}
        for name, components in self.found.items():
            if isinstance(components, GramComponents):
                components.components = self.most[name]
        self.passes += once
        return once

    def _by_moments(self, layer: Any) -> bool:
        return self.method == "gram" and layer.in_features <= _WIDEST

    def _components(self, name: str) -> Components:
        layer = self.layers[name]
        if not self._by_moments(layer):
            if _several():
                raise InputError(
                    f"{canonical_name(name)}: the incremental way sees one process's data only; "
                    f"use method='gram' and layers of at most {_WIDEST} inputs"
                )
            return IncrementalComponents(
                layer.in_features, self.most[name], tau=float(self.options.tau)
            )
        weight = layer.get_base_layer().weight
        device = weight.device if weight.device.type in ("cpu", "cuda") else "cpu"
        return GramComponents(layer.in_features, self.most[name], center=self.center, device=device)

    def _add(self, name: str, x: Tensor) -> None:
        began = time.perf_counter()
        try:
            self.found[name].update(x)
        except InputError as error:
            raise InputError(f"{canonical_name(name)}: {error}") from error
        self.seconds[name] += time.perf_counter() - began

    def _pass(
        self,
        batch: Any,
        wanted: Sequence[str],
        forward: Callable[[nn.Module, Any], Any],
        mask_of: Callable[[Any], Tensor | None],
    ) -> None:
        batch = moved(batch, device_of(self.model))
        with watch_inputs({n: self.layers[n] for n in wanted}, self._add, mask_of(batch)):
            forward(self.model, batch)
        self.passes += 1

    def _moving(self) -> list[str]:
        """Layers whose components, as many as any of their group now gets, still move."""
        moments = all(isinstance(c, GramComponents) for c in self.found.values())
        if moments or any(c.count == 0 for c in self.found.values()):
            return list(self.found)
        ranks = self.allot()
        return [
            name
            for name, found in self.found.items()
            if not found.converged(max(ranks[n] for n, o in self.owner.items() if o == name))
        ]

    def check_counts(self, least: int) -> None:
        """Raise where a layer saw too few tokens of all processes; warn where one still moves."""
        for name, found in self.found.items():
            if isinstance(found, GramComponents) and _several():
                found.all_reduce()
            if found.count < self.most[name]:
                raise InputError(
                    f"{canonical_name(name)} saw {found.count} tokens, fewer than the "
                    f"{self.most[name]} components that are asked for; give more or longer "
                    "batches, or a smaller rank or rho"
                )
            if found.count < least:
                raise InputError(
                    f"{canonical_name(name)} saw {found.count} tokens, fewer than "
                    f"min_tokens={least}; give more or longer batches"
                )
        if not any(c.solve()[2].any() for c in self.found.values()):
            raise InputError(
                f"no input varies, that of {canonical_name(next(iter(self.found)))} for one: all "
                "tokens are the same; give batches of different texts"
            )
        self.unconverged = tuple(
            canonical_name(name)
            for name in self._moving()
            if isinstance(self.found[name], IncrementalComponents)
        )
        if self.unconverged:
            warnings.warn(
                f"after {self.passes} batches components of {len(self.unconverged)} layers still "
                f"moved ({', '.join(self.unconverged[:3])}, ...); raise max_batches, or use "
                "method='gram'",
                stacklevel=3,
            )

    # -- ranks -------------------------------------------------------------------------------

    def allot(self) -> dict[str, int]:
        """Give the budget to the components that explain most."""
        solved = {}
        for name, components in self.found.items():
            began = time.perf_counter()
            solved[name] = components.solve()[2].cpu()
            self.seconds[name] += time.perf_counter() - began
        limits = {
            name: min(most, len(solved[self.owner[name]])) for name, most in self.limits.items()
        }
        # Owners first, then those that share their input: what decides between equal ratios.
        order = [*self.found, *(n for n, owner in self.owner.items() if n != owner)]
        names = [name for name in order for _ in range(limits[name])]
        ratios = torch.cat([solved[self.owner[name]][: limits[name]] for name in order])
        budget = sum(self.start.values())
        best = ratios.argsort(descending=True, stable=True)[:budget]
        counts = Counter(names[i] for i in best.tolist())
        ranks = {name: counts[name] for name in self.layers}
        for name, owner in self.owner.items():
            if ranks[owner] < ranks[name] <= limits[owner]:
                ranks[name], ranks[owner] = ranks[owner], ranks[name]
        return ranks

    def weights(self, ranks: Mapping[str, int], whiten: bool) -> dict[str, Tensor]:
        """Return ``A`` of each layer, ``(rank, in)``."""
        state = {}
        for name in self.layers:
            vectors, values, _ = self.found[self.owner[name]].solve()
            rows, size = vectors[: ranks[name]], values[: ranks[name]]
            if whiten:
                # A direction without variance keeps its length.
                size = torch.where(size > 1e-6 * values.max().clamp_min(1e-300), size, 1.0)
                rows = rows / size.sqrt()[:, None]
            base = self.layers[name].get_base_layer().weight
            state[name] = rows.to(device=base.device, dtype=torch.float32).contiguous()
        return state

    def report(self, ranks: Mapping[str, int]) -> EvaReport:
        """Say what was found, under the base model's own names."""
        solved = {name: c.solve()[2] for name, c in self.found.items()}
        ratios = {name: solved[self.owner[name]].tolist() for name in self.layers}
        return EvaReport(
            ranks={canonical_name(n): rank for n, rank in ranks.items()},
            explained={
                canonical_name(n): float(sum(ratios[n][:rank])) for n, rank in ranks.items()
            },
            ratios={canonical_name(n): tuple(r) for n, r in ratios.items()},
            shapes={
                canonical_name(n): (layer.out_features, layer.in_features)
                for n, layer in self.layers.items()
            },
            batches=self.passes,
            unconverged=self.unconverged,
            seconds={canonical_name(n): spent for n, spent in self.seconds.items()},
            fingerprint=model_fingerprint(self.model),
        )


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
