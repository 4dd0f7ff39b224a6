"""MKOR: rank-1 Kronecker-factored preconditioning before any first-order optimizer (2306.01685)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fullrank.core.errors import InputError
from fullrank.optim.foundation import FullrankOptimizer
from fullrank.optim.gradients import NonFinite, check_dense, judge
from fullrank.optim.mkor_factors import Rule, sm_update
from fullrank.optim.mkor_layers import Exclude, Hooks, Layer, find_layers
from fullrank.optim.mkor_reduce import mean_over_ranks, world
from fullrank.optim.mkor_settings import (
    Inner,
    Rescale,
    Scale,
    Settings,
    check_model,
    check_schedule,
    make_inner,
)

__all__ = ["MKOR", "sm_update"]


class MKOR(Optimizer):
    """Preconditions gradients by running inverses of Kronecker factors; an inner optimizer steps.

    For a layer ``W~ = [W | b]`` of shape ``(m, n')`` two inverses are kept, ``R^-1 (n', n')`` of
    the inputs and ``L^-1 (m, m)`` of the output gradients. Every ``inv_freq`` steps each takes in
    one vector, the batch's mean, by :func:`sm_update`; at every step the layer's gradients become
    ``nu L^-1 [dW | db] R^-1``, scaled by nu to the norm they had, and the inner optimizer goes on
    from there with its own momentum, weight decay and learning rate.

    Linear layers (transformers' ``Conv1D`` too) and ungrouped Conv2d are preconditioned. All other
    parameters, those of excluded or tied layers, and layers that are frozen or were not used reach
    the inner optimizer as they are.

    With the default rule an inverse is the identity less a few outer products, whose vectors are
    what is stored: at most ``min(370, d / 2)`` for a side of d in float32, and few early on.
    An inverse that has more is stored as a matrix.

    ``param_groups`` and ``state`` are the inner optimizer's, so that learning-rate schedulers
    work. The model's hooks hold statistics of ``O(m + n)`` numbers a layer.

    Parameters
    ----------
    model
        The model, bare or wrapped by DDP or ``torch.compile``. Its weights must be whole.
    optimizer
        The inner optimizer; or a function that makes one from a list of parameters, e.g.
        ``functools.partial(torch.optim.AdamW, lr=1e-3)``; None (default) is ``torch.optim.SGD``
        with torch's defaults.
    inv_freq
        f: steps between two refreshes, 10.
    blend
        Weight of the old inverse in a refresh: 0.95, as in the official code. gamma for ``ema``.
    rule
        ``"official"`` or ``"ema"``; see :func:`sm_update`.
    zeta
        A factor that exceeds ``threshold`` becomes ``zeta J + (1 - zeta) I`` at the next refresh,
        and so does the other one of its layer: 0.9. (The official code resets to I by mistake.)
    threshold
        2. The official rule keeps factors below 1; ``ema`` needs this.
    clip
        Statistics are clipped to +-100 element by element before they are averaged.
    warmup_steps
        So many steps at the start refresh every time: 0 (10 in the official examples).
    factor_dtype
        Of the stored factors: float32 (and float64 for weights in float64); half precision
        halves the memory, and the arithmetic is still in float32.
    exclude
        Layers to leave alone: modules, parts of canonical names, or shell patterns. Name a head
        over a large vocabulary here.
    process_group
        Ranks whose statistics are averaged; by default all, where ``torch.distributed`` is
        initialised.
    grad_scale
        Factor that is on the loss: a number, a tensor, or a function that returns one, such as
        ``GradScaler.get_scale``. Also an attribute, which may be set before a backward pass.
    rescale
        ``"sum"`` (default, the official code) compares ``|dW| + |db|``, ``"joint"`` the norm of
        ``[dW | db]``.
    accumulation_steps
        K micro-batches a step: rows are divided by K before they are clipped. Statistics are
        means over the passes that a step has really seen, whatever this says. A loss that was
        divided by K as well (Hugging Face's Trainer does) is told by ``grad_scale=1 / K``.
    nonfinite
        What a NaN or an infinity in any gradient does, as in
        :class:`~fullrank.optim.FullrankOptimizer`. On an accelerator ``"skip"`` reads one flag a
        step, unless the inner optimizer can leave out a step by itself (torch's fused ones).

    Attributes
    ----------
    inner
        The inner optimizer.
    row_mask
        None, or a mask of the rows of this batch, e.g. ``attention_mask``; set it before the
        forward pass. Rows are means over what it marks, in Linear layers with as many rows.

    Raises
    ------
    InputError
        On values out of range, sharded weights, an unknown name to exclude, sparse gradients.

    Notes
    -----
    The scale of the statistics supposes a loss that is a mean over rows (of a batch, times the
    sequence); with a sum over N rows give ``grad_scale=N``. The first refresh of a layer leaves
    its factors at the identity. A layer that is used twice in a pass gets the mean over both.
    The update that is printed in the paper is not implemented, see :func:`sm_update`.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), inv_freq=1)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(16, 4)).square().mean().backward()
    ...     _ = optimizer.step()
    >>> left, right = optimizer.factors("0")
    >>> left.shape, right.shape
    (torch.Size([8, 8]), torch.Size([5, 5]))
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Inner = None,
        inv_freq: int = 10,
        blend: float = 0.95,
        rule: Rule = "official",
        zeta: float = 0.9,
        threshold: float = 2.0,
        clip: float = 100.0,
        warmup_steps: int = 0,
        factor_dtype: torch.dtype = torch.float32,
        exclude: Exclude = (),
        process_group: dist.ProcessGroup | None = None,
        grad_scale: Scale = 1.0,
        rescale: Rescale = "sum",
        *,
        accumulation_steps: int = 1,
        nonfinite: NonFinite = "skip",
    ) -> None:
        settings = Settings(
            rule=rule,
            blend=blend,
            zeta=zeta,
            threshold=threshold,
            clip=clip,
            factor_dtype=factor_dtype,
            rescale=rescale,
            grad_scale=grad_scale,
            accumulation_steps=accumulation_steps,
        )
        settings.check()
        check_schedule(inv_freq, warmup_steps, nonfinite)
        check_model(model)
        self.inner = make_inner(model, optimizer)
        if isinstance(self.inner, MKOR | torch.optim.LBFGS):
            raise InputError(
                f"the inner optimizer is {type(self.inner).__name__}; give it a first-order one"
            )
        super().__init__([{"params": group["params"]} for group in self.inner.param_groups], {})
        self._link()
        this = weakref.ref(self)
        if hasattr(self.inner, "_optimizer_load_state_dict_post_hooks"):  # wrappers may have none
            self.inner.register_load_state_dict_post_hook(lambda _: _linked(this()))
        self.inv_freq, self.warmup_steps, self.steps = inv_freq, warmup_steps, 0
        self.nonfinite: NonFinite = nonfinite
        self.process_group = process_group
        self.settings = settings
        self.layers = find_layers(model, exclude, self.settings)
        self._names = {id(p): repr(name) for name, p in model.named_parameters()}
        self._hooks = Hooks()
        self._hooks.attach(self.layers, self._due)
        # The model outlives its optimizers.
        weakref.finalize(self, self._hooks.remove)

    def _link(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.defaults = self.inner.defaults

    @property
    def grad_scale(self) -> Scale:
        """Factor that is on the loss; see the class."""
        return self.settings.grad_scale

    @grad_scale.setter
    def grad_scale(self, value: Scale) -> None:
        self.settings.grad_scale = value

    @property
    def row_mask(self) -> Tensor | None:
        """Mask of the rows of this batch; see the class."""
        return self.settings.row_mask

    @row_mask.setter
    def row_mask(self, value: Tensor | None) -> None:
        self.settings.row_mask = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        if hasattr(self, "settings"):
            self.inner.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and the statistics of passes that no step has used."""
        self._clear()
        self.inner.zero_grad(set_to_none)

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return the inverses of a layer as matrices.

        Parameters
        ----------
        layer
            Its canonical name.

        Returns
        -------
        tuple
            ``L^-1 (m, m)`` of the output side and ``R^-1 (n', n')`` of the input side.

        Raises
        ------
        InputError
            When no layer of this name is preconditioned.
        """
        for each in self.layers:
            if each.name == layer:
                return each.matrices()
        names = ", ".join(each.name for each in self.layers[:4])
        raise InputError(f"no layer {layer!r} is preconditioned; there are {names or 'none'}, ...")

    def factor_bytes(self) -> int:
        """Bytes that the stored factors take now, beside the inner optimizer's state."""
        return sum(
            value.untyped_storage().nbytes()
            for layer in self.layers
            for value in layer.state.values()
        )

    # -- the step --------------------------------------------------------------------------

    def _due(self) -> bool:
        wanted = self.steps % self.inv_freq == 0 or self.steps < self.warmup_steps
        return wanted and bool(self._hooks.handles)

    def _clear(self) -> None:
        for layer in self.layers:
            layer.statistics.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Refresh where it is time, precondition the gradients in place, take an inner step.

        Parameters
        ----------
        closure
            Evaluates the model again and returns the loss.

        Returns
        -------
        float or None
            The closure's loss.

        Raises
        ------
        InputError
            On a sparse gradient; on one that is not finite with ``nonfinite="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        for param in params:
            check_dense(param.grad, partial(self._name, param))
        verdict = judge(
            [p.grad for p in params],
            [False] * len(params),
            self.nonfinite,
            lambda i: self._name(params[i]),
        )
        if not verdict.skip_all:
            if self._due():
                self._refresh(verdict.skip)
            for layer in self.layers:
                layer.precondition()
            self._inner_step(verdict.skip)
        self._clear()
        self.steps += 1
        return loss

    def _name(self, param: Tensor) -> str:
        # The inner optimizer may have more than the model's.
        places = {
            id(each): f"{i} of group {g}"
            for g, group in enumerate(self.param_groups)
            for i, each in enumerate(group["params"])
        }
        where = {**places, **self._names}[id(param)]
        return f"parameter {where} of shape {tuple(param.shape)}"

    def _refresh(self, skip: dict[torch.device, Tensor]) -> None:
        everything: list[tuple[Layer, Tensor, Tensor, Tensor | None]] = []
        if world(self.process_group) > 1:
            everything += mean_over_ranks(self.layers, self.process_group)
        else:
            used = [layer for layer in self.layers if layer.statistics.seen]
            everything += [(layer, *layer.means(), None) for layer in used]
        for layer, a, g, known in everything:
            use = torch.ones((), dtype=torch.bool, device=a.device) if known is None else known
            if a.device in skip:
                use = use & ~skip[a.device]
            layer.update(a, g, use)

    def _inner_step(self, skip: dict[torch.device, Tensor]) -> None:
        """Step the inner optimizer, unless a flag on the device says no."""
        alone = isinstance(self.inner, FullrankOptimizer) and self.inner.nonfinite == "skip"
        if not skip or alone:
            self.inner.step()
            return
        flag = next(iter(skip.values()))
        if not getattr(self.inner, "_step_supports_amp_scaling", False):
            if not flag.item():
                self.inner.step()
            return
        # What GradScaler does with optimizers that look at its flag on the device themselves.
        self.inner.found_inf, self.inner.grad_scale = flag.float(), None  # type: ignore[attr-defined]
        try:
            self.inner.step()
        finally:
            del self.inner.found_inf, self.inner.grad_scale  # type: ignore[attr-defined]

    # -- resume ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and under ``"mkor"`` the steps and the factors by layer."""
        return {
            **self.inner.state_dict(),
            "mkor": {
                "inner": type(self.inner).__name__,
                "steps": self.steps,
                "layers": {
                    layer.name: {key: value.clone() for key, value in layer.state.items()}
                    for layer in self.layers
                },
            },
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, bit for bit.

        Raises
        ------
        InputError
            When the state belongs to another optimizer, or to another model.
        """
        own = state_dict.get("mkor")
        if not isinstance(own, dict):
            raise InputError(
                "this is the state of another optimizer: it has no 'mkor'. A state of the inner "
                "optimizer alone is for optimizer.inner.load_state_dict. Torch's get_state_dict "
                "leaves out what belongs to no parameter: save optimizer.state_dict() itself"
            )
        if own["inner"] != type(self.inner).__name__:
            raise InputError(
                f"this state was saved with the inner optimizer {own['inner']}, "
                f"here it is {type(self.inner).__name__}"
            )
        names = [layer.name for layer in self.layers]
        if list(own["layers"]) != names:
            foreign = set(own["layers"]) ^ set(names)
            raise InputError(
                f"the saved state has other layers than this model, e.g. {sorted(foreign)[:3]}: "
                "the model or exclude= has changed since it was saved"
            )
        before = [layer.state for layer in self.layers]
        try:
            for layer in self.layers:
                layer.load(own["layers"][layer.name])
            rest = {key: value for key, value in state_dict.items() if key != "mkor"}
            self.inner.load_state_dict(rest)
        except BaseException:
            for layer, state in zip(self.layers, before, strict=True):
                layer.load(state)
            raise
        self._link()
        self._clear()
        self.steps = own["steps"]

    def __getstate__(self) -> dict[str, Any]:
        raise InputError(
            "MKOR cannot be copied or pickled: its hooks belong to one model. "
            "Make a new one and load this one's state_dict()"
        )


def _linked(optimizer: MKOR | None) -> None:
    """Share what the inner optimizer has loaded by itself."""
    if optimizer is not None:
        optimizer._link()
