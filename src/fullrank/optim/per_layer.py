"""Stepping in the backward pass: each gradient is used and freed before the next one is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch.distributed as dist
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim import checks as valid
from fullrank.optim.foundation import FullrankOptimizer
from fullrank.optim.sharded import is_sharded


class PerLayer:
    """Hooks that step each parameter as soon as its gradient is complete, and free the gradient.

    With them the gradients of a model are never all in memory at once. ``optimizer.step()`` may
    still be called, as a training loop does: it finds no gradients, or those that wait for more
    passes. It steps these and starts a new count, so that a loop which calls it takes the same
    steps as without hooks, also where it ends an epoch early, or where some passes leave
    parameters out. A loop that never calls it steps each parameter by every
    ``accumulation_steps``-th of the parameter's own gradients. Learning rates are read at the
    moment of each parameter's step, so that schedulers work as usual.

    A gradient that is not finite leaves out its own parameter's step alone. Passes that were thrown
    away by ``zero_grad()`` do not count. Under gradient checkpointing take ``use_reentrant=False``:
    the other form runs a backward pass for every segment, in each of which a layer that segments
    share would be stepped.

    Parameters
    ----------
    optimizer
        Any of the package's whose parameters can be stepped apart.
    accumulation_steps
        Backward passes that make up one step: 1. Gradients add up until the last of them.
    max_grad_norm
        Must be None: the norm of all gradients is not known before the last one, when the others
        have been used.

    Raises
    ------
    InputError
        With ``max_grad_norm``; for an optimizer whose parameters depend on one another; where
        several processes hold the same parameters (DDP), since hooks see gradients before they are
        averaged.

    Examples
    --------
    >>> import torch
    >>> from fullrank.optim import GaLoreAdamW
    >>> weight = torch.nn.Parameter(torch.ones(6, 4))
    >>> optimizer = GaLoreAdamW([weight], rank=2)
    >>> with PerLayer(optimizer):
    ...     weight.square().sum().backward()
    >>> weight.grad is None, optimizer.state[weight]["step"].item()
    (True, 1.0)
    """

    def __init__(
        self,
        optimizer: FullrankOptimizer,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
    ) -> None:
        if not isinstance(optimizer, FullrankOptimizer) or not optimizer.separable:
            raise InputError(
                f"{type(optimizer).__name__} cannot step a parameter without the others; "
                "call step() after the backward pass"
            )
        valid.whole("accumulation_steps", accumulation_steps)
        if max_grad_norm is not None:
            raise InputError(
                f"max_grad_norm={max_grad_norm}: with a step for each layer the norm of all "
                "gradients is never known. Clip by value or by parameter in a hook of your own, "
                "use an optimizer with a limiter (FiraAdamW), or step after the backward pass"
            )
        params = [p for group in optimizer.param_groups for p in group["params"]]
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if many and not all(is_sharded(p) for p in params):
            raise InputError(
                "several processes hold the same parameters, as under DistributedDataParallel; "
                "hooks would see gradients before they are averaged. Shard the model with "
                "torch.distributed.fsdp.fully_shard, or step after the backward pass"
            )
        self.optimizer = optimizer
        self.accumulation_steps = accumulation_steps
        self._waiting: dict[Tensor, int] = {}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._on_gradient)
            for p in params
            if p.requires_grad
        ]
        if accumulation_steps > 1:
            self._hooks += [p.register_hook(self._fresh(p)) for p in params if p.requires_grad]
        self._hooks.append(optimizer.register_step_pre_hook(self._close))

    def _fresh(self, param: Tensor) -> Callable[[Tensor], None]:
        """Return a hook that starts counting anew where passes before were thrown away."""

        def before(_: Tensor) -> None:
            if param.grad is None:
                self._waiting.pop(param, None)

        return before

    def _on_gradient(self, param: Tensor) -> None:
        seen = self._waiting.pop(param, 0) + 1
        if seen < self.accumulation_steps:
            self._waiting[param] = seen
        else:
            self._step(param)

    def _close(self, *_: object) -> None:
        waiting, self._waiting = self._waiting, {}
        for param in waiting:
            self._step(param)

    def _step(self, param: Tensor) -> None:
        if param.grad is not None:
            self.optimizer.step_parameter(param)
            param.grad = None

    def remove(self) -> None:
        """Take the hooks off; ``step()`` works as before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def step_per_layer(
    optimizer: FullrankOptimizer,
    accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
) -> PerLayer:
    """Step each layer within the backward pass, and free its gradient; see :class:`PerLayer`."""
    return PerLayer(optimizer, accumulation_steps, max_grad_norm)
