"""The mean gradient of chosen weights over a few batches, one whole gradient at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fullrank.core.batches import call, device_of, moved
from fullrank.core.errors import InputError
from fullrank.core.names import canonical_name
from fullrank.core.progress import progress as progress_bar


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Run a model on a batch and return its loss."""
    result = call(model, batch)
    loss = result if isinstance(result, Tensor) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError(
            "the model returned no loss; give batches with labels, or a function of model and "
            "batch as loss_fn"
        )
    return loss


class GradientSum:
    """The mean of a weight's gradients, whole; kept on ``device``, by default the gradients'."""

    def __init__(self, dtype: torch.dtype, device: torch.device | None = None) -> None:
        self._dtype, self._device = dtype, device
        self._home: torch.device | None = None
        self.total: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Take in a gradient, which may be freed then."""
        if self.total is None:
            self._home = gradient.device
            self.total = gradient.to(self._device or gradient.device, self._dtype, copy=True)
        else:
            self.total += gradient.to(self.total.device)

    def mean(self, count: int) -> Tensor:
        """Over so many batches, and over all processes."""
        assert self.total is not None
        return shared(self.total.to(self._home).div_(count))


class Folds(Protocol):
    """Something that gradients are folded into, one by one."""

    def add(self, gradient: Tensor) -> None:
        """Take in a gradient, which may be freed then."""


def mean_gradients(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    data: Iterable[Any],
    batches: int,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] = loss_of,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Mean gradient of the loss with respect to weights, over at most so many batches.

    Every process of ``torch.distributed`` gets the mean over all.

    Parameters
    ----------
    model, weights, data, batches, loss_fn, progress
        As :func:`fold_gradients`.
    dtype
        Of the sums.

    Raises
    ------
    InputError
        As :func:`fold_gradients`.

    Examples
    --------
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> found = mean_gradients(layer, {"w": layer.weight}, [torch.ones(1, 2)], 1,
    ...                        loss_fn=lambda m, x: m(x).sum(), progress=False)
    >>> found["w"]
    tensor([[1., 1.]])
    """
    sums = {name: GradientSum(dtype) for name in weights}
    seen = fold_gradients(model, weights, sums, data, batches, loss_fn=loss_fn, progress=progress)
    return {name: total.mean(seen) for name, total in sums.items()}


def fold_gradients(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    into: Mapping[str, Folds],
    data: Iterable[Any],
    batches: int,
    *,
    loss_fn: Callable[[nn.Module, Any], Tensor] = loss_of,
    progress: bool = True,
) -> int:
    """Fold the gradients of weights into something, batch by batch; return how many there were.

    A gradient is folded, and freed, as soon as the backward pass has made it: there is never more
    than one. A weight that is used several times gets the sum over its uses.

    Parameters
    ----------
    model
        Run as it is, in training mode or not.
    weights
        Name -> weight; all other parameters are left out of the backward pass.
    into
        Name -> what takes its gradients.
    data
        Batches.
    batches
        How many to use.
    loss_fn
        ``(model, batch) -> loss``.
    progress
        Show a bar.

    Raises
    ------
    InputError
        When there is no batch, the loss is not finite, or a weight gets no gradient.
    """
    seen = 0
    with (
        _folding(model, weights, into),
        progress_bar("gradients", batches, progress, "batches") as advance,
    ):
        for batch in data:
            loss = loss_fn(model, moved(batch, device_of(model)))
            if not torch.isfinite(loss):
                raise InputError(
                    f"the loss of batch {seen + 1} is {loss.item()}; gradients cannot be estimated"
                )
            if not loss.requires_grad:
                raise InputError(
                    f"the loss of batch {seen + 1} does not depend on any weight to adapt; give "
                    "other targets, or a loss_fn that runs the model"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            seen += 1
            advance(1)
            if seen == batches:
                break
        if not seen:
            raise InputError("the data loader is empty; at least one batch is needed")
    return seen


def fold_step(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    into: Mapping[str, Folds],
    step: Callable[[], Any],
) -> int:
    """Fold the gradients of weights as :func:`fold_gradients`, from one's own backward passes.

    Parameters
    ----------
    model, weights, into
        As there.
    step
        Runs the model on batches and calls ``backward()`` on their losses, once each.

    Returns
    -------
    int
        How many backward passes there were.

    Raises
    ------
    InputError
        When there was none, or a weight got no gradient.
    """
    with _folding(model, weights, into) as passes:
        step()
        if not passes:
            raise InputError(
                "the step made no backward pass that reaches a weight to adapt; it is to run the "
                "model and to call backward() on the loss"
            )
    return max(passes.values())


@contextmanager
def _folding(
    model: nn.Module, weights: Mapping[str, Tensor], into: Mapping[str, Folds]
) -> Iterator[Counter[str]]:
    """Fold what backward passes bring; yield how often each weight got a gradient."""
    passes: Counter[str] = Counter()
    names: dict[int, list[str]] = {}
    for name, weight in weights.items():
        names.setdefault(id(weight), []).append(name)  # layers may share one
    with ExitStack() as stack:
        stack.enter_context(_only(model, weights.values()))
        for shared_by in names.values():
            weight = weights[shared_by[0]]
            fold = _folder(shared_by, into, passes)
            hook = weight.register_post_accumulate_grad_hook(fold)  # type: ignore[no-untyped-call]
            stack.callback(hook.remove)
        stack.enter_context(torch.enable_grad())
        yield passes
    missing = [name for name in weights if not passes[name]]
    if missing:
        raise InputError(
            f"{canonical_name(missing[0])} got no gradient: the loss does not depend on it; leave "
            "it out of target_modules"
        )


def _folder(
    names: Sequence[str], into: Mapping[str, Folds], passes: Counter[str]
) -> Callable[[Tensor], None]:
    def fold(weight: Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None
        for name in names:
            into[name].add(gradient)
        passes.update(names)
        weight.grad = None

    return fold


@contextmanager
def calibrating(model: nn.Module, seed: int) -> Iterator[None]:
    """Training mode, as gradients are meant, with dropout that depends on the seed alone.

    Modes, buffers (running means of normalisation) and randomness are as before afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model.train()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def check_size(name: str, size: float) -> None:
    """Raise unless the norm of a layer's gradient says that there is something to start from."""
    if not 0 < size < math.inf:
        raise InputError(
            f"the gradient of {canonical_name(name)} is zero or not finite; give other batches, or "
            "leave it out"
        )


def shared(mean: Tensor) -> Tensor:
    """Return the mean over all processes of ``torch.distributed``; changes ``mean``."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
    return mean


@contextmanager
def _only(model: nn.Module, weights: Iterable[Tensor]) -> Any:
    """Let these weights alone ask for gradients; everything is as before afterwards."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for parameter, _, _ in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    for weight in weights:
        weight.requires_grad_()
    try:
        yield
    finally:
        for parameter, asked, gradient in before:
            parameter.requires_grad_(asked)
            parameter.grad = gradient
