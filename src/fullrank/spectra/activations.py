"""Spectra of what flows through a model's modules, in constant memory."""

from __future__ import annotations

import fnmatch
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fullrank.core.batches import call, device_of, in_decoder, moved
from fullrank.core.capture import capture
from fullrank.core.errors import InputError
from fullrank.core.modes import evaluating
from fullrank.core.names import canonical_modules
from fullrank.spectra.matrices import patterns
from fullrank.spectra.meter import EXACT_TO, SKETCH, SpectrumMeter, few_samples
from fullrank.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import nn

Side = Literal["input", "output"]


class ActivationMeter:
    """Spectra of the inputs or outputs of modules over the forward passes inside a ``with``.

    Each position of each sample is a vector, along the last dimension (the channels, for
    convolutions). Padding never counts: where the model is given an ``attention_mask``
    ``(samples, positions)``, by name or place or in its first argument, vectors it masks are left
    out, whether samples or positions come first inside the model (samples, where there are as many
    of both); in a decoder behind an encoder those that ``decoder_attention_mask`` masks. Where
    positions come one by one after those in a cache, the mask's last ones are meant. Modules that
    give no floating-point tensor are passed over, and what gradient checkpointing computes again.

    Parameters
    ----------
    model
        Any module; wrappers such as DDP, PEFT and ``torch.compile`` are seen through in names.
    modules
        Shell patterns over canonical names, e.g. ``"*.attention"`` or ``["*.0", "*.mlp"]``, or
        name -> module.
    side
        ``"output"`` or ``"input"``.
    center, exact_to, sketch, device
        As for :class:`~fullrank.spectra.SpectrumMeter`, of which each module gets one.

    Raises
    ------
    InputError
        When a pattern matches no module.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    >>> with ActivationMeter(model, "0") as meter:
    ...     for batch in torch.randn(10, 8, 4):
    ...         _ = model(batch)
    >>> meter.spectra()["0"], meter["0"].count  # doctest: +ELLIPSIS
    (Spectrum(3 values, ...), 80)
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Iterable[str] | str | Mapping[str, nn.Module],
        *,
        side: Side = "output",
        center: bool = False,
        exact_to: int = EXACT_TO,
        sketch: int = SKETCH,
        device: torch.device | str | None = None,
    ) -> None:
        if side not in ("input", "output"):
            raise InputError(f"side={side!r}; it is 'input' or 'output'")
        self._model = model
        self._side = side
        self._modules = matching_modules(model, modules)
        self._meters = {
            name: SpectrumMeter(center=center, exact_to=exact_to, sketch=sketch, device=device)
            for name in self._modules
        }
        self._mask: Tensor | None = None
        self._decoder_mask: Tensor | None = None
        self._open: Any = None

    def __getitem__(self, name: str) -> SpectrumMeter:
        return self._meters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._meters)

    def __enter__(self) -> ActivationMeter:
        self._open = self._watching()
        self._open.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        opened, self._open = self._open, None
        opened.__exit__(*error)

    def spectra(self) -> dict[str, Spectrum]:
        """Canonical name -> spectrum, of the modules that ran.

        Raises
        ------
        InputError
            When none did.

        Warns
        -----
        UserWarning
            When there were fewer vectors than dimensions.
        """
        seen = {name: meter for name, meter in self._meters.items() if meter.count}
        if not seen:
            raise InputError(
                "none of the chosen modules ran on the data: give at least one batch of inputs, "
                f"and modules that it passes through, not only {', '.join([*self._meters][:3])}"
            )
        short = [name for name, m in seen.items() if m.count < (m.width or 0)]
        if short:
            meter = seen[short[0]]
            warnings.warn(
                f"{len(short)} of {len(seen)} modules, e.g. {short[0]}: "
                + few_samples(meter.count, meter.width or 0),
                stacklevel=2,
            )
        return {name: meter._spectrum() for name, meter in seen.items()}

    def sync(self, process_group: Any = None) -> None:
        """Sum over all processes of a ``torch.distributed`` group; every process must call it."""
        for meter in self._meters.values():
            meter.sync(process_group)

    def reset(self) -> None:
        """Forget everything."""
        for meter in self._meters.values():
            meter.reset()

    def state_dict(self) -> dict[str, Tensor]:
        """Return plain tensors, fit for safetensors."""
        return {
            f"{name}/{key}": tensor
            for name, meter in self._meters.items()
            for key, tensor in meter.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` gave.

        Raises
        ------
        InputError
            When it holds a module that this meter does not.
        """
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self._meters}
        for key, tensor in state.items():
            name, _, part = key.rpartition("/")
            if name not in parts:
                raise InputError(f"the state holds module {name!r}, which is not watched here")
            parts[name][part] = tensor
        for name, part_state in parts.items():
            self._meters[name].load_state_dict(part_state)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        # A SentenceTransformer's encode() goes past the model's own hooks.
        first = [*self._model][:1] if isinstance(self._model, torch.nn.Sequential) else []
        entrances = [self._model, *first]
        handles = [
            e.register_forward_pre_hook(self._note_mask, with_kwargs=True) for e in entrances
        ]
        try:
            with capture(self._modules, self._consume, self._side):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._mask = self._decoder_mask = None

    def _note_mask(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = _given(module, args, named)
        self._mask = _mask(given, "")
        self._decoder_mask = _mask(given, "decoder_")

    def _consume(self, name: str, x: Tensor) -> None:
        if not x.is_floating_point() or not x.ndim:
            return
        if torch._C._current_graph_task_id() != -1:
            return  # gradient checkpointing runs the module again in the backward pass
        vectors = _vectors(self._modules[name], x)
        try:
            self._meters[name].update(vectors, self._fitted(name, vectors))
        except InputError as error:
            raise InputError(f"{self._side} of {name or 'the model'}: {error}") from error

    def _mask_of(self, name: str) -> Tensor | None:
        """Of an encoder and decoder: the mask of the tokens that a module reads."""
        return self._decoder_mask if in_decoder(self._model, name) else self._mask

    def _fitted(self, name: str, x: Tensor) -> Tensor | None:
        """Return the mask in the leading shape of vectors; None where all count."""
        mask, lead = self._mask_of(name), x.shape[:-1]
        if mask is None:
            return None
        samples, positions = mask.shape
        if lead.numel() == mask.numel() and lead != (positions, samples):
            return mask.reshape(lead)
        for first in (mask, mask.T):
            if lead[:2] == first.shape:
                return first.reshape(*lead[:2], *[1] * (len(lead) - 2)).expand(lead)
        if len(lead) == 3 and lead[0] == samples and lead[-1] == positions:
            return mask[:, None].expand(lead)  # heads between
        if len(lead) < 2 or samples not in lead[:2] or lead[0] == 1 or bool(mask.all()):
            return None  # pooled, or the same for every sample
        raise InputError(
            f"vectors of shape {tuple(x.shape)} do not line up with the attention mask of "
            f"{tuple(mask.shape)}, so padding cannot be told: leave the module out, or give "
            "batches without padding"
        )


@torch.no_grad()
def activation_spectra(
    model: nn.Module,
    batches: Iterable[Any],
    modules: Iterable[str] | str | Mapping[str, nn.Module],
    *,
    side: Side = "output",
    center: bool = False,
    exact_to: int = EXACT_TO,
    sketch: int = SKETCH,
    across_processes: bool = False,
) -> dict[str, Spectrum]:
    """Spectra of the outputs (or inputs) of modules over batches of data.

    The model runs in evaluation mode, and is left as it was. See :class:`ActivationMeter`.

    Parameters
    ----------
    model, modules, side, center, exact_to, sketch
        As for :class:`ActivationMeter`. Layers give hidden states, embedding tables embeddings.
    batches
        Tensors, tuples of tensors, or mappings such as a tokenizer gives.
    across_processes
        Sum over the processes of ``torch.distributed``, each with batches of its own; all must
        then call this.

    Returns
    -------
    dict
        Canonical name -> spectrum, of the modules that ran.

    Raises
    ------
    InputError
        When a pattern matches nothing, nothing ran, or values that count are not finite.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
    >>> found = activation_spectra(model, torch.randn(10, 8, 4), ["1", "2"])
    >>> sorted(found), bool(1 <= found["1"].effective_rank <= 3)
    (['1', '2'], True)
    """
    meter = ActivationMeter(
        model, modules, side=side, center=center, exact_to=exact_to, sketch=sketch
    )
    device = device_of(model)
    with evaluating(model), meter:
        for batch in batches:
            call(model, moved(batch, device))
    if across_processes:
        meter.sync()
    return meter.spectra()


def matching_modules(
    model: nn.Module, modules: Iterable[str] | str | Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Canonical name -> module, of those that patterns match; the model itself is ``""``.

    Raises
    ------
    InputError
        When a pattern matches none.
    """
    if isinstance(modules, Mapping):
        if not modules:
            raise InputError("no modules were chosen: the mapping of them is empty")
        return dict(modules)
    named = dict(canonical_modules(model))
    wanted = patterns(modules) or []
    for pattern in wanted:
        if not fnmatch.filter(named, pattern):
            some = ", ".join([name for name in named if name][:5])
            raise InputError(f"no module matches {pattern!r}; there are {some}, ...")
    found = {
        name: module
        for name, module in named.items()
        if any(fnmatch.fnmatchcase(name, p) for p in wanted) and (name or "" in wanted)
    }
    if not found:
        raise InputError("no modules were chosen: give a pattern, such as '*.mlp'")
    return found


def _given(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments of a model by name."""
    # A SentenceTransformer takes its features as one mapping.
    if args and isinstance(args[0], Mapping) and "attention_mask" not in named:
        return args[0]
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    # Wrappers pass on whatever they get; tokens come first.
    return {**dict(zip(names or ["input_ids"], args, strict=False)), **named}


def _mask(given: Mapping[str, Any], prefix: str) -> Tensor | None:
    """The mask of the positions that an encoder, or a decoder, reads."""
    mask = given.get(f"{prefix}attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    # It may be of what a cache holds as well.
    read = _positions_read(given, prefix)
    return mask.bool()[:, -read:] if read else mask.bool()


def _positions_read(given: Mapping[str, Any], prefix: str) -> int | None:
    """How many tokens of each sample a language model is given; None where it is given none."""
    ids: Any = given.get(f"{prefix}input_ids")
    embedded = given.get(f"{prefix}inputs_embeds")
    if isinstance(embedded, Tensor):
        return embedded.shape[1]
    tokens = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()
    return ids.shape[1] if tokens else None


def _vectors(module: nn.Module, x: Tensor) -> Tensor:
    """Move the features to the end: they stand second in what convolutions take and give."""
    convolution = isinstance(
        module, (torch.nn.modules.conv._ConvNd, torch.nn.modules.batchnorm._BatchNorm)
    )
    return x.movedim(1, -1) if convolution and x.ndim > 2 else x
