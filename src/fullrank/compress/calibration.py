"""What flows through a model's layers on calibration data, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from fullrank.compress.batches import (
    Batches,
    TokenLayout,
    both_masks,
    output_of,
    probe,
    unambiguous_first,
)
from fullrank.compress.matrices import matricise
from fullrank.compress.matrices_conv import CONVOLUTIONS
from fullrank.core.batches import call, in_decoder
from fullrank.core.capture import capture
from fullrank.core.errors import InputError, StoreError
from fullrank.core.files import atomic_write
from fullrank.core.modes import evaluating
from fullrank.core.moments import Moments
from fullrank.core.progress import progress as progress_bar

Side = Literal["input", "output"]


@dataclass
class Reaction:
    """Second moments that say how a model's output reacts to an error in one layer.

    An error that all tokens of a sequence share adds up where the model pools or attends over
    them; one that differs from token to token averages out. So both are kept apart: moments over
    tokens, and over whole sequences.

    Attributes
    ----------
    gradient
        Of the gradient at each token.
    sequence_gradient
        Of its sum over each sequence.
    sequence_mean
        Of the mean over each sequence of the side the layer's statistics are of.
    """

    gradient: Moments
    sequence_gradient: Moments
    sequence_mean: Moments


@dataclass
class LayerStats:
    """Moments of one layer, whose weight is W: ``(m, n)``.

    Attributes
    ----------
    side
        ``"input"``: moments of x, ``(n, n)``. ``"output"``: moments of ``W x`` (the output
        without its bias), ``(m, m)``. Each gives what output PCA needs, since the covariance of
        ``W x`` is ``W C_x W^T``; the narrower one is cheaper.
    moments
        Count, sum and second moment of that side.
    reaction
        How the model's output reacts to that side, if gradients were collected.
    """

    side: Side
    moments: Moments
    reaction: Reaction | None = None

    @property
    def count(self) -> int:
        """Samples (tokens) seen."""
        return self.moments.count

    def serves(self, method: str) -> bool:
        """Whether this is enough for a factor solver: the layer ran, and its output mattered.

        A layer whose output the model does not use (the pooler of an encoder whose embeddings
        are means) gets no gradient.
        """
        if method == "gauss_newton":
            return self.reaction is not None and self.reaction.gradient.count > 0
        return self.count > 0

    def output_covariance(self, weight: Tensor) -> Tensor:
        """``(m, m)`` covariance of ``W x``."""
        covariance = self.moments.covariance
        if self.side == "output":
            return covariance
        W = weight.to(covariance)
        return W @ covariance @ W.T

    def output_mean(self, weight: Tensor) -> Tensor:
        """``(m,)`` mean of ``W x``."""
        mean = self.moments.mean
        return mean if self.side == "output" else weight.to(mean) @ mean


class CalibrationStats(Mapping[str, LayerStats]):
    """Streaming moments of what goes into, or comes out of, chosen layers.

    Statistics are summed in float64 and do not depend on how the data was cut into batches.
    Padding never counts where a batch has an attention mask, whether a layer sees tokens as
    ``(batch, length)``, ``(length, batch)`` or one after another. (Where the two are equal in all
    batches, ``(batch, length)`` is assumed.) In a decoder behind an encoder that is the
    ``decoder_attention_mask``; without one all its tokens count.

    Parameters
    ----------
    modules
        Canonical name -> layer (``nn.Linear``, ``Conv1D`` or a convolution).
    side
        ``"input"``, ``"output"`` or ``"auto"``: the narrower one of each layer. Of a convolution
        always the output, each place of which is a sample.
    gradients
        Whether to keep second moments of output gradients as well (see :meth:`observe`).

    Examples
    --------
    >>> layer = nn.Linear(3, 2)
    >>> stats = CalibrationStats({"fc": layer})
    >>> with stats.watch():
    ...     _ = layer(torch.randn(5, 3)), layer(torch.randn(4, 3))
    >>> stats["fc"].side, stats["fc"].count
    ('output', 9)
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        side: Side | Literal["auto"] = "auto",
        gradients: bool = False,
    ) -> None:
        if side not in ("auto", "input", "output"):
            raise InputError(f"side={side!r}; it is 'input', 'output' or 'auto'")
        self._modules = dict(modules)
        self._gradients = gradients
        self._layout = TokenLayout()
        self._stats: dict[str, LayerStats] = {}
        for name, module in self._modules.items():
            found = matricise(module)
            m, n = found.stack * found.shape[0], found.shape[1]
            use: Side = ("output" if m <= n else "input") if side == "auto" else side
            if isinstance(module, CONVOLUTIONS):
                use = "output"
            self._stats[name] = _empty(use, m if use == "output" else n, module, gradients)

    def __getitem__(self, name: str) -> LayerStats:
        return self._stats[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)

    def __repr__(self) -> str:
        seen = [s.count for s in self.values()]
        return f"CalibrationStats({len(seen)} layers, {max(seen, default=0):,} samples)"

    # -- collecting ------------------------------------------------------------------------

    def _narrow(self, name: str, value: Tensor) -> Tensor:
        """Turn a layer's output into what its statistics are of: without the bias."""
        value = _channels_last(self._modules[name], value)
        bias = getattr(self._modules[name], "bias", None)
        return value if bias is None else value.double() - bias.detach().double()

    @contextmanager
    def watch(self, mask: Callable[[], Tensor | None] = lambda: None) -> Iterator[None]:
        """Add everything that flows through the layers while the context is open.

        Parameters
        ----------
        mask
            Called at each layer; returns the current batch's ``(batch, length)`` attention
            mask, or None when every position counts.

        Raises
        ------
        InputError
            When these statistics are from a file, which knows of no modules.
        """
        with self._watch(lambda _: mask()):
            yield

    @contextmanager
    def _watch(self, mask: Callable[[str], Tensor | None]) -> Iterator[None]:
        """As :meth:`watch`, with a mask for each layer by its name."""
        if unknown := [name for name in self if name not in self._modules]:
            raise InputError(
                f"these statistics are from a file, and not tied to a model's layers ({unknown[0]},"
                " ...); make new ones for the model, and merge these into them"
            )

        def add(name: str, value: Tensor) -> None:
            stats = self._stats[name]
            x = self._narrow(name, value) if stats.side == "output" else value
            x, real = self._layout.by_token(name, x, mask(name))
            try:
                stats.moments.update(x, real)
                if stats.reaction is not None:
                    total, length = _over_sequences(x, real)
                    stats.reaction.sequence_mean.update(total / length)
            except InputError as error:
                raise InputError(f"{name}: {error}") from error

        sides: dict[Side, dict[str, nn.Module]] = {"input": {}, "output": {}}
        for name, stats in self._stats.items():
            sides[stats.side][name] = self._modules[name]
        with capture(sides["input"], add, "input"), capture(sides["output"], add, "output"):
            yield

    def observe(
        self, model: nn.Module, data: Iterable[Any], *, progress: bool = True, seed: int = 0
    ) -> CalibrationStats:
        """Run a model over calibration data and add what its layers see.

        With ``gradients=True`` each batch is also run backward from a random direction in the
        model's output, so that the second moment of the gradients is, in expectation, the
        Gauss-Newton matrix of the squared output error (for logits: the Fisher information).

        Parameters
        ----------
        model
            The model the layers are in.
        data
            Anything :class:`~fullrank.compress.Batches` takes.
        progress
            Show a bar.
        seed
            Of the random directions.

        Raises
        ------
        InputError
            When there is no data, or when a layer sees NaN or infinite values.
        """
        batches = data if isinstance(data, Batches) else Batches(model, data)
        generator = torch.Generator().manual_seed(seed)
        seen = 0
        decoder = {name for name in self if in_decoder(model, name)}
        current: tuple[Tensor | None, Tensor | None] = (None, None)

        def mask_of(name: str) -> Tensor | None:
            return current[name in decoder]

        with (
            evaluating(model),
            self._watch(mask_of),
            progress_bar("calibrate", batches.total, progress, "batches") as advance,
        ):
            for batch in unambiguous_first(batches):
                current = both_masks(batch)
                if self._gradients:
                    self._with_gradients(model, batch, mask_of, generator)
                else:
                    with torch.no_grad():
                        call(model, batch)
                seen += 1
                advance(1)
        if not seen:
            raise InputError("the calibration data is empty; give at least a few dozen samples")
        return self

    def _with_gradients(
        self,
        model: nn.Module,
        batch: Any,
        mask_of: Callable[[str], Tensor | None],
        generator: torch.Generator,
    ) -> None:
        taps: list[tuple[str, Tensor]] = []

        def tap(name: str) -> Callable[..., Tensor]:
            def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
                # With frozen weights nothing upstream asks for a gradient: start one here.
                if not output.requires_grad:
                    output.requires_grad_()
                taps.append((name, output))
                # What follows may work in place, and then the tap would be of its result.
                return output.clone()

            return hook

        handles = [m.register_forward_hook(tap(name)) for name, m in self._modules.items()]
        try:
            with torch.enable_grad():
                loss = probe(output_of(call(model, batch), *both_masks(batch)), generator)
                # Asking for these gradients only spares the weights' own.
                gradients = torch.autograd.grad(loss, [y for _, y in taps], allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        for (name, _), gradient in zip(taps, gradients, strict=True):
            stats = self._stats[name]
            if gradient is None or stats.reaction is None:
                continue
            gradient = _channels_last(self._modules[name], gradient)
            if stats.side == "input":
                gradient = gradient @ matricise(self._modules[name]).matrix
            gradient, real = self._layout.by_token(name, gradient, mask_of(name))
            stats.reaction.gradient.update(gradient, real)
            total, _ = _over_sequences(gradient, real)
            stats.reaction.sequence_gradient.update(total)

    # -- sharing, saving ---------------------------------------------------------------------

    def _all_moments(self) -> Iterator[Moments]:
        for stats in self.values():
            yield from _parts(stats).values()

    def merge(self, other: CalibrationStats) -> None:
        """Add what another instance, over the same layers, has seen."""
        if {n: s.side for n, s in self.items()} != {n: s.side for n, s in other.items()}:
            raise InputError("these statistics are of other layers or sides; they cannot be merged")
        for mine, theirs in zip(self._all_moments(), other._all_moments(), strict=True):
            mine.merge(theirs)

    def all_reduce(self, group: Any = None) -> None:
        """Sum over all processes of a ``torch.distributed`` group, in place."""
        for moments in self._all_moments():
            moments.all_reduce(group)

    def save(self, path: str | Path) -> Path:
        """Write the statistics to a safetensors file, whole or not at all."""
        tensors = {}
        for name, stats in self.items():
            for part, moments in _parts(stats).items():
                for key, tensor in moments.state_dict().items():
                    tensors[f"{name}|{stats.side}|{part}|{key}"] = tensor.cpu().contiguous()
        return atomic_write(path, safetensors_bytes(tensors, {"fullrank": "calibration 1"}))

    @classmethod
    def load(cls, path: str | Path) -> CalibrationStats:
        """Read what :meth:`save` wrote.

        Raises
        ------
        StoreError
            When the file is absent, damaged, or something else.
        """
        states: dict[tuple[str, str], dict[str, dict[str, Tensor]]] = {}
        try:
            with safe_open(Path(path), framework="pt") as file:
                if (file.metadata() or {}).get("fullrank") != "calibration 1":
                    raise StoreError(f"{path} does not hold calibration statistics")
                for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    name, side, part, field = key.split("|")
                    layer = states.setdefault((name, side), {})
                    layer.setdefault(part, {})[field] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path} cannot be read as calibration statistics: {error}") from error
        loaded = cls({})
        for (name, side), parts in states.items():
            moments = {part: Moments(state["sum"].numel()) for part, state in parts.items()}
            for part, state in parts.items():
                moments[part].load_state_dict(state)
            own = moments.pop("moments")
            reaction = Reaction(**moments) if moments else None
            loaded._stats[name] = LayerStats(cast(Side, side), own, reaction)
        return loaded


def _parts(stats: LayerStats) -> dict[str, Moments]:
    return {"moments": stats.moments, **(vars(stats.reaction) if stats.reaction else {})}


def _empty(side: Side, width: int, module: nn.Module, gradients: bool) -> LayerStats:
    weight = module.weight
    assert isinstance(weight, Tensor)
    # Apple's GPUs have no float64.
    device = weight.device if weight.device.type in ("cpu", "cuda") else torch.device("cpu")
    reaction = Reaction(*(Moments(width, device) for _ in range(3))) if gradients else None
    return LayerStats(side, Moments(width, device), reaction)


def _channels_last(module: nn.Module, output: Tensor) -> Tensor:
    """Return a layer's output, or its gradient, with one vector a token or pixel."""
    if not isinstance(module, CONVOLUTIONS):
        return output
    return output.movedim(-1 - len(module.kernel_size), -1)


def _over_sequences(value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum over each sequence's real tokens, ``(batch, d)``, and their number, ``(batch, 1)``."""
    # A sum over a sequence is out of float16's range long before its terms are.
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if mask is not None:
        weights = mask.to(device=value.device, dtype=value.dtype)
        return (weights[:, None] @ value)[:, 0], weights.sum(1, keepdim=True).clamp_min(1)
    rows = value.reshape(value.shape[0], -1, value.shape[-1])
    return rows.sum(1), torch.full_like(rows[:, 0, :1], rows.shape[1])
