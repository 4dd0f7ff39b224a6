"""`evaluating`: a model in evaluation mode for a while, and every module back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a ``torch.nn.Module`` into evaluation mode; give each submodule its own mode back.

    ``model.train(model.training)`` would not: a model that was loaded has a network in evaluation
    mode inside a wrapper that is not, and dropout must not come on behind its owner's back.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Dropout().eval(), torch.nn.Dropout())
    >>> with evaluating(model):
    ...     [m.training for m in model.modules()]
    [False, False, False]
    >>> [m.training for m in model.modules()]
    [True, False, True]
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
