"""The mean gradient of chosen weights over a few batches, one whole gradient at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.adapters.layer_inputs import device_of, run_batch
from fullrank.core.errors import InputError
from fullrank.core.names import canonical_name
from fullrank.core.progress import progress as progress_bar


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Run a model on a batch and return its loss."""
    result = run_batch(model, batch)
    loss = result if isinstance(result, Tensor) else getattr(result, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError(
            "the model returned no loss; give batches with labels, or a function of model and "
            "batch as loss_fn"
        )
    return loss


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

    A gradient is added to its sum, and freed, as soon as the backward pass has made it: beside
    the sums there is one gradient at a time. A weight that is used several times gets the sum over
    its uses. Every process of ``torch.distributed`` gets the mean over all.

    Parameters
    ----------
    model
        Run as it is, in training mode or not.
    weights
        Name -> weight; all other parameters are left out of the backward pass.
    data
        Batches.
    batches
        How many to use.
    loss_fn
        ``(model, batch) -> loss``.
    dtype
        Of the sums.
    progress
        Show a bar.

    Raises
    ------
    InputError
        When there is no batch, the loss is not finite, or a weight gets no gradient.

    Examples
    --------
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> found = mean_gradients(layer, {"w": layer.weight}, [torch.ones(1, 2)], 1,
    ...                        loss_fn=lambda m, x: m(x).sum(), progress=False)
    >>> found["w"]
    tensor([[1., 1.]])
    """
    sums: dict[str, Tensor] = {}
    seen = 0
    with ExitStack() as stack:
        stack.enter_context(_only(model, weights.values()))
        for name, weight in weights.items():
            hook = weight.register_post_accumulate_grad_hook(_adder(name, sums, dtype))  # type: ignore[no-untyped-call]
            stack.callback(hook.remove)
        stack.enter_context(torch.enable_grad())
        advance = stack.enter_context(progress_bar("gradients", batches, progress, "batches"))
        for batch in data:
            loss = loss_fn(model, device_of(model, batch))
            if not torch.isfinite(loss):
                raise InputError(
                    f"the loss of batch {seen + 1} is {loss.item()}; gradients cannot be estimated"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            seen += 1
            advance(1)
            if seen == batches:
                break
    if not seen:
        raise InputError("the data loader is empty; at least one batch is needed")
    missing = [name for name in weights if name not in sums]
    if missing:
        raise InputError(
            f"{canonical_name(missing[0])} got no gradient: the loss does not depend on it; leave "
            "it out of target_modules"
        )
    return {name: _shared(total.div_(seen)) for name, total in sums.items()}


def _adder(name: str, sums: dict[str, Tensor], dtype: torch.dtype) -> Callable[[Tensor], None]:
    def add(weight: Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None
        if name in sums:
            sums[name] += gradient
        else:
            sums[name] = gradient.to(dtype, copy=True)
        weight.grad = None

    return add


def _shared(mean: Tensor) -> Tensor:
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
