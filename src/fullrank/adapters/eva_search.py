"""What EVA looks for: components of the inputs of a model's layers, and a budget's ranks."""

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
from fullrank.adapters.eva_report import EvaReport
from fullrank.adapters.layer_inputs import same_inputs, watch_inputs
from fullrank.core.batches import device_of, moved
from fullrank.core.errors import InputError
from fullrank.core.modes import evaluating
from fullrank.core.names import canonical_name, model_fingerprint
from fullrank.core.progress import progress as progress_bar

Solver = Literal["gram", "ipca"]

# Above this width an n x n matrix of second moments costs more than the incremental way.
_WIDEST = 8192


class Search:
    """Collects inputs, allots ranks, makes the weights."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, Any],
        adapter: str,
        options: Any,
        method: Solver,
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
