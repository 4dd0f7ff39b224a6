"""PELA: a low-rank backbone, repaired once by intermediate pre-training, fine-tuned many times.

Guo, Wang, Kankanhalli: "PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
CVPR 2024, arXiv 2310.10700. Every linear layer becomes two of rank ``m n / (c (m + n))`` by SVD;
this file does that. Then the small model is trained on the pre-training data beside the original,
see :class:`~fullrank.compress.PELALoss` and :class:`~fullrank.compress.PELATrainer`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import nn

from fullrank.compress.factorization import factorize
from fullrank.compress.matrices import matricise
from fullrank.compress.planning import entry_for
from fullrank.compress.targets import Patterns, all_layers, factorisable
from fullrank.core.errors import InputError
from fullrank.core.names import model_fingerprint
from fullrank.core.plan import PlanEntry, RankPlan
from fullrank.core.rank_rules import ParamRatio

OMITTED = ("*norm*", "*head*", "*patch_embed*", "*downsample*")
"""What the official code leaves dense everywhere. It adds ``*attn.proj`` for Swin, and ``*cls*``
and ``*_proj*`` for ALBEF."""


def pela_plan(
    model: nn.Module,
    ratio: float = 2.0,
    exclude: Patterns = OMITTED,
    *,
    include: Patterns | None = None,
    min_outputs: int = 10,
) -> RankPlan:
    """Give every linear layer the rank at which it keeps ``1 / ratio`` of its parameters.

    Parameters
    ----------
    model
        Any module with ``nn.Linear`` (or transformers' ``Conv1D``) layers. Convolutions,
        embeddings and norms stay as they are.
    ratio
        Compression ratio c, at least 1; rank ``floor(m n / (c (m + n)))``. The paper uses 2 for
        DeiT, 1.5 for Swin, 3 for ALBEF.
    exclude
        Name patterns of layers that stay dense. Those of :data:`OMITTED` may match nothing; any
        other must match. To add to them: ``(*OMITTED, "*attn.proj")``.
    include
        Name patterns of layers to compress; by default every linear layer but the output head of
        a language model.
    min_outputs
        Layers with fewer outputs stay dense (10 in the official code: matching heads).

    Returns
    -------
    RankPlan
        Layers that would not shrink, or whose rank would be 0, stay dense; the reason is there.

    Raises
    ------
    InputError
        On a ratio below 1, or a pattern that matches nothing.

    Examples
    --------
    >>> plan = pela_plan(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)))
    >>> plan["0"].rank, plan["2"].rank, plan["2"].reason
    (10, None, 'fewer than 10 outputs')
    """
    if min_outputs < 1:
        raise InputError(f"min_outputs {min_outputs}; it is at least 1")
    rule = ParamRatio(ratio)
    entries = {}
    layers = factorisable(model, include, _present(model, exclude), convolutions=False)
    for name, module in layers.items():
        m, n = matricise(module).matrix.shape
        if m < min_outputs:
            reason = f"fewer than {min_outputs} outputs"
            entries[name] = PlanEntry((m, n), None, "svd", reason=reason)
        else:
            rank = rule(np.empty(0), m, n)
            entries[name] = entry_for((m, n), rank, "svd", repr(rule))
    return RankPlan(entries, fingerprint=model_fingerprint(model))


def pela_compress(
    model: nn.Module,
    ratio: float = 2.0,
    exclude: Patterns = OMITTED,
    *,
    include: Patterns | None = None,
    min_outputs: int = 10,
    inplace: bool = False,
    init: bool = True,
) -> nn.Module:
    """Compress a model's linear layers by SVD: the student of the intermediate stage.

    Each weight becomes ``B A`` with ``A = S^{1/2} V^T``, ``(r, n)``, and ``B = U S^{1/2}``,
    ``(m, r)``, the bias on B; computed in float64, kept in the weight's dtype and on its device.

    Parameters
    ----------
    model
        The trained model, which is then the teacher.
    ratio, exclude, include, min_outputs
        See :func:`pela_plan`.
    inplace
        Change ``model`` itself. By default a copy is compressed, since the teacher is needed.
    init
        False only builds the shapes, for a checkpoint of a student to be loaded into.

    Returns
    -------
    Module
        The student. All its parameters are trained, also the layers that stay dense.
        :func:`~fullrank.compress.report` lists the ranks; it saves and loads as every shrunk
        model does (:func:`~fullrank.compress.save`).

    Raises
    ------
    InputError
        When no layer would shrink; see also :func:`pela_plan`.

    Examples
    --------
    >>> teacher = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> pela_compress(teacher, ratio=2.0)
    Sequential(
      (0): LowRankLinear(in_features=64, out_features=32, rank=10, bias=True)
      (1): ReLU()
      (2): Linear(in_features=32, out_features=4, bias=True)
    )
    """
    plan = pela_plan(model, ratio, exclude, include=include, min_outputs=min_outputs)
    if all(entry.rank is None for entry in plan.values()):
        reasons = "; ".join(f"{name}: {entry.reason}" for name, entry in list(plan.items())[:3])
        raise InputError(f"no layer would shrink at ratio {ratio} ({reasons}); see pela_plan")
    student = factorize(model if inplace else copy.deepcopy(model), plan, init=init, progress=False)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return student


def _present(model: nn.Module, patterns: Patterns) -> Sequence[str]:
    """Leave out those of the official patterns that this model has no layer for."""
    names = all_layers(model, convolutions=False)
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    return [
        pattern
        for pattern in given
        if pattern not in OMITTED or any(fnmatchcase(name, pattern) for name in names)
    ]
