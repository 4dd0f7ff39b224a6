"""Symmetric products, thin products and eigenvalues, by torch's BLAS or by numpy's.

numpy's BLAS has the symmetric product, faster thin products and, in float64, a faster eigenvalue
solver, but threads of its own: where both libraries have several, those of one spin while the
other's work, and everything takes two to four times as long. So it is numpy's turn only where
torch has one thread, as in the workers that take a matrix each, and then it has one as well.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

# The number of threads is the process's: one caller at a time changes it.
_CHANGING = threading.Lock()


@functools.cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep numpy's BLAS to one thread; nothing to do and no waiting where it is so already."""
    if all(library.num_threads == 1 for library in _pools().lib_controllers):
        yield
        return
    with _CHANGING, _pools().limit(limits=1):
        yield


def _numpy_pays(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and torch.get_num_threads() == 1


def gram(columns: Tensor) -> Tensor:
    """``A^T A`` for ``A (m, n)``; with numpy half the work of a matrix product."""
    if not _numpy_pays(columns):
        return columns.T @ columns
    array = columns.numpy()
    with _one_thread():
        return torch.from_numpy(array.T @ array)


def thin_product(A: Tensor, B: Tensor) -> Tensor:
    """``A @ B`` for a B of few columns, in float32 or float64.

    numpy took a third to a tenth of the time of torch for 4 to 64 columns.
    """
    if _numpy_pays(A):
        with _one_thread():
            return torch.from_numpy(A.numpy() @ B.numpy())
    return A @ B


def eigvalsh(symmetric: Tensor) -> Tensor:
    """Ascending eigenvalues ``(n,)``; in float64 numpy took 0.6 of torch's time."""
    if symmetric.dtype == torch.float64 and _numpy_pays(symmetric):
        with _one_thread():
            return torch.from_numpy(np.linalg.eigvalsh(symmetric.numpy()))
    values: Tensor = torch.linalg.eigvalsh(symmetric)
    return values


def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues ``(n,)`` and their vectors as columns.

    In float64 numpy took 0.8 of torch's time; in float32 it is the other way round.
    """
    if symmetric.dtype == torch.float64 and _numpy_pays(symmetric):
        with _one_thread():
            values, vectors = np.linalg.eigh(symmetric.numpy())
        return torch.from_numpy(values), torch.from_numpy(vectors)
    values, vectors = torch.linalg.eigh(symmetric)
    return values, vectors
