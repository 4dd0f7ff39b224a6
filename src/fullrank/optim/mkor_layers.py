"""The layers that MKOR preconditions: what each says of a batch, and where its gradient is."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fullrank.core.errors import InputError
from fullrank.core.names import canonical_modules, is_linear_like
from fullrank.optim.mkor_factors import InverseFactor
from fullrank.optim.mkor_settings import Settings
from fullrank.optim.mkor_statistics import Statistics, clipped_sum, mean_patches
from fullrank.optim.patterns import matches

Exclude = str | nn.Module | Sequence[str | nn.Module]


class Layer:
    """One Linear or Conv2d with its two running inverses.

    ``W~ = [W | b]`` is ``(m, n')``; ``right`` is the ``(n', n')`` inverse of the input side,
    ``left`` the ``(m, m)`` one of the output side.

    Parameters
    ----------
    name, module
        The module and its canonical name.
    settings
        Shared by all layers.
    """

    def __init__(self, name: str, module: nn.Module, settings: Settings) -> None:
        self.name = name
        self.module: Any = module
        self.settings = settings
        self.conv = isinstance(module, nn.Conv2d)
        self.transposed = type(module).__name__ == "Conv1D"
        bias = getattr(module, "bias", None)
        self.biased = bias is not None and bias.requires_grad
        self.statistics = Statistics()
        self.left: InverseFactor | None = None
        self.right: InverseFactor | None = None
        self.pull: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n')``."""
        m, n = self._as_matrix(self.module.weight).shape
        return m, n + self.biased

    def _as_matrix(self, tensor: Tensor) -> Tensor:
        return tensor.t() if self.transposed else tensor.flatten(1)

    # -- statistics ------------------------------------------------------------------------

    def watch(self, due: Callable[[], bool]) -> RemovableHandle:
        """Take statistics of every pass with gradients while ``due()`` says so."""
        hook = _Watch(self, due)
        handle: RemovableHandle = self.module.register_forward_hook(hook, with_kwargs=True)
        return handle

    def note(self, x: Tensor, output: Tensor) -> None:
        """Take in a pass's inputs, and its output's gradient when that comes."""
        if not output.numel():
            return  # no rows, as of an expert without tokens: no means
        # What is there belongs to a step that was not taken, unless a backward pass is under way,
        # in which checkpointing runs layers again.
        if self.module.weight.grad is None and torch._C._current_graph_task_id() == -1:
            self.statistics.clear()
        mask = self._mask(output)
        a = self.input_mean(x, mask)
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda grad: self.statistics.add(a, self.output_mean(grad, mask))
        )

    def _mask(self, output: Tensor) -> Tensor | None:
        mask = self.settings.row_mask
        if mask is None or self.conv or mask.numel() * output.shape[-1] != output.numel():
            return None
        return mask

    def _wide(self, rows: Tensor) -> Tensor:
        return rows.detach().to(torch.promote_types(rows.dtype, torch.float32))

    def input_mean(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``a``: mean over rows of ``clip(a_i / K, +-c)``, ``(n',)``; K micro-batches a step."""
        s = self.settings
        rows = mean_patches(self._wide(x), self.module) if self.conv else self._wide(x)
        bound = s.clip * s.accumulation_steps
        total, count = clipped_sum(rows.reshape(-1, rows.shape[-1]), bound, mask)
        a = total / (count * s.accumulation_steps)
        if not self.biased:
            return a
        one = min(1.0 / s.accumulation_steps, s.clip)
        return torch.cat([a, a.new_full((1,), one)])

    def output_mean(self, grad: Tensor, mask: Tensor | None = None) -> Tensor:
        """``g``: mean over rows of ``clip(N g_i / (K scale), +-c)``, ``(m,)``; N rows."""
        s = self.settings
        rows = self._wide(grad)
        positions = 1
        if self.conv:
            rows = rows if rows.dim() == 4 else rows.unsqueeze(0)
            positions = rows.shape[2] * rows.shape[3]
            rows = rows.sum((2, 3))
        rows = rows.reshape(-1, rows.shape[-1])
        count = len(rows) if mask is None else mask.sum().to(rows.dtype)
        divisor = s.scale() * (s.accumulation_steps * positions)
        # The bound moves to the rows as they are: no pass to scale them.
        total, _ = clipped_sum(rows, s.clip * divisor / count, mask)
        return total / divisor

    # -- factors ---------------------------------------------------------------------------

    def means(self) -> tuple[Tensor, Tensor]:
        """The step's a and g; zeros where the layer was not used."""
        s = self.statistics
        if s.a is None or s.g is None:
            m, n = self.shape
            weight = self.module.weight
            wide = torch.promote_types(weight.dtype, torch.float32)
            return weight.new_zeros(n, dtype=wide), weight.new_zeros(m, dtype=wide)
        # As many passes as announced add up to a mean; so do more, or fewer, after this.
        factor = self.settings.accumulation_steps / s.seen
        return (s.a, s.g) if factor == 1.0 else (s.a * factor, s.g * factor)

    def update(self, a: Tensor, g: Tensor, use: Tensor) -> None:
        """Refresh both inverses; the first time they stay at the identity.

        Parameters
        ----------
        a, g
            The statistics.
        use
            0-d bool on their device: False leaves the factors as they are.
        """
        s = self.settings
        if self.left is None or self.right is None or self.pull is None:
            self._start()
            return
        use = use & torch.isfinite(a).all() & torch.isfinite(g).all()
        pull = self.pull
        self.right.update(a.to(self.right.wide), use, pull & use, s.zeta)
        self.left.update(g.to(self.left.wide), use, pull & use, s.zeta)
        # Under the official rule J <= I but for the rounding of half precision.
        if s.rule == "ema" or s.threshold < 1.0 or s.factor_dtype.itemsize < 4:
            largest = torch.maximum(self.left.largest(), self.right.largest())
            self.pull = torch.where(use, (largest > s.threshold) & ~pull, pull)

    def _start(self) -> None:
        device = self.module.weight.device
        self.left, self.right = self._identities(device)
        self.pull = torch.zeros((), dtype=torch.bool, device=device)

    def _identities(self, device: torch.device) -> tuple[InverseFactor, InverseFactor]:
        s, dtype = self.settings, self.settings.factor_dtype
        if dtype.itemsize >= 4:
            dtype = torch.promote_types(dtype, self.module.weight.dtype)
        dense = s.threshold < 1.0
        m, n = (InverseFactor(side, s.rule, s.blend, dtype, device, dense) for side in self.shape)
        return m, n

    @property
    def most_bytes(self) -> int:
        """What :attr:`state` takes once there were many updates."""
        factors = self._identities(torch.device("meta"))
        return torch.bool.itemsize + sum(factor.most_bytes for factor in factors)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """``L^-1`` and ``R^-1`` as matrices in float32 at least."""
        if self.left is not None and self.right is not None:
            return self.left.form.matrix(), self.right.form.matrix()
        like = self._wide(self.module.weight[:0])
        m, n = (torch.eye(side, dtype=like.dtype, device=like.device) for side in self.shape)
        return m, n

    def release(self) -> None:
        """Give the factors and statistics back; the layer starts from the identity again."""
        self.left = self.right = self.pull = None
        self.statistics.clear()

    # -- gradients -------------------------------------------------------------------------

    def precondition(self) -> None:
        """Replace the gradients by ``nu L^-1 [dW | db] R^-1``, of the norm they had."""
        weight, bias = self.module.weight, self.module.bias if self.biased else None
        if self.left is None or self.right is None or weight.grad is None:
            return
        if (bias is not None and bias.grad is None) or (self.left.trivial and self.right.trivial):
            return
        dW = self._as_matrix(weight.grad)
        G = dW if bias is None else torch.cat([dW, bias.grad.unsqueeze(1)], 1)
        G = G.to(torch.promote_types(G.dtype, torch.float32))
        P = self.right.form.right(self.left.form.left(G))
        nu = self._norm(G) / self._norm(P)
        fine = torch.isfinite(nu)
        if fine.device.type == "cpu":
            if not fine.item():
                return
            P.mul_(nu)
        else:
            P = torch.where(fine, P * nu, G)
        n = dW.shape[1]
        new = P[:, :n].t() if self.transposed else P[:, :n]
        weight.grad.copy_(new.reshape(weight.shape))
        if bias is not None:
            bias.grad.copy_(P[:, n])

    def _norm(self, G: Tensor) -> Tensor:
        def norm(part: Tensor) -> Tensor:
            found: Tensor = torch.linalg.vector_norm(part)
            return found

        if not self.biased or self.settings.rescale == "joint":
            return norm(G)
        return norm(G[:, :-1]) + norm(G[:, -1])

    # -- state -----------------------------------------------------------------------------

    @property
    def state(self) -> dict[str, Tensor]:
        """Plain tensors that define both inverses and the stabiliser; empty before the start."""
        if self.left is None or self.right is None or self.pull is None:
            return {}
        return {
            "pull": self.pull,
            **{f"left_{key}": value for key, value in self.left.form.state.items()},
            **{f"right_{key}": value for key, value in self.right.form.state.items()},
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take the factors from a saved state."""
        self.release()
        if not state:
            return
        self._start()
        assert self.left is not None
        assert self.right is not None
        assert self.pull is not None
        for side, factor in (("left", self.left), ("right", self.right)):
            start = f"{side}_"
            own = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
            factor.load(own, f"layer {self.name!r}, {side} side")
        self.pull = state["pull"].to(self.pull, copy=True)


class _Watch:
    """The forward hook of a layer, which lives on the model and keeps nothing else alive.

    A copy of the model shares it, where it sees a foreign module; a saved model gets one that does
    nothing.
    """

    def __init__(self, layer: Layer, due: Callable[[], bool]) -> None:
        self._layer = weakref.ref(layer)
        self._due = weakref.WeakMethod(due)

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        layer, due = self._layer(), self._due()
        if layer is None or due is None or module is not layer.module:
            return
        wanted = module.weight.requires_grad and due()
        if wanted and torch.is_grad_enabled() and output.requires_grad:
            layer.note(args[0] if args else kwargs["input"], output)

    def __deepcopy__(self, memo: Any) -> _Watch:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_watch, ()


def _no_watch() -> Callable[..., None]:
    return _ignore


def _ignore(module: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Do nothing, as the hook of a saved model."""


# -- which layers ----------------------------------------------------------------------------


def find_layers(model: nn.Module, exclude: Exclude, settings: Settings) -> list[Layer]:
    """Layers of a model that can be preconditioned.

    Linear (transformers' ``Conv1D`` too) and ungrouped Conv2d whose weight and bias are parameters
    that belong to no other module.

    Raises
    ------
    InputError
        When something to exclude is not there.

    Warns
    -----
    UserWarning
        When nothing is left.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners[id(param)] = owners.get(id(param), 0) + 1
    given = [exclude] if isinstance(exclude, str | nn.Module) else list(exclude)
    unused = dict(enumerate(given))
    found = []
    for name, module in _candidates(model):
        out = [i for i, each in enumerate(given) if _is(each, name, module)]
        for i in out:
            unused.pop(i, None)
        own = dict(module.named_parameters(recurse=False))
        if not out and "weight" in own and all(owners[id(param)] == 1 for param in own.values()):
            found.append(Layer(name, module, settings))
    if unused:
        names = ", ".join(name for name, _ in list(_candidates(model))[:4])
        raise InputError(
            f"exclude: no layer is {next(iter(unused.values()))!r}; "
            f"there are {names or 'none'}, ..."
        )
    if not found:
        warnings.warn(
            "MKOR found no Linear or Conv2d layer to precondition; "
            "the inner optimizer does all the work",
            stacklevel=3,
        )
    return found


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in canonical_modules(model):
        if is_linear_like(module) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            yield name, module


def _is(each: str | nn.Module, name: str, module: nn.Module) -> bool:
    if isinstance(each, nn.Module):
        return each is module
    return matches(name, each)


@dataclass(slots=True)
class Hooks:
    """The hooks of all layers, to be taken off together."""

    handles: list[RemovableHandle] = field(default_factory=list)

    def attach(self, layers: Sequence[Layer], due: Callable[[], bool]) -> None:
        """Watch the layers."""
        self.remove()
        self.handles = [layer.watch(due) for layer in layers]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
