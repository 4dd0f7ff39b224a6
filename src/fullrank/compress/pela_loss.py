"""PELA's training loss: the task, the teacher's features, and the weights it started from.

``L = L_task + alpha L_fd + beta L_wp`` (Guo, Wang, Kankanhalli, CVPR 2024, arXiv 2310.10700).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fullrank.compress.factorization import factorised
from fullrank.compress.layers import LowRankLinear
from fullrank.compress.matrices import matricise
from fullrank.compress.pela_features import Features, State, Which
from fullrank.core.batches import call
from fullrank.core.errors import InputError
from fullrank.core.names import canonical_modules

Form = Literal["hinge", "two_sided"]


class PELATerms(NamedTuple):
    """The loss and its parts, unweighted, and what the student returned."""

    total: Tensor
    task: Tensor
    feature: Tensor
    perturbation: Tensor
    output: Any


class PELALoss:
    """The intermediate stage's loss of one batch.

    - *task*: the model's own loss, or ``criterion``;
    - *feature distillation*: mean over the blocks of the mean squared difference between the
      student's and the teacher's hidden states, on the same inputs;
    - *weight perturbation*: with ``d = max_ij |(B A - W)_ij|`` of each factorised matrix, the mean
      over matrices of ``max(0, d - eps)^2``.

    Parameters
    ----------
    student
        From :func:`~fullrank.compress.pela_compress`; may be wrapped (DDP, ``torch.compile``).
    teacher
        The original model. It is put into evaluation mode and frozen, here and for good.
    alpha
        Weight of feature distillation: 1 for vision models, 0.1 for ALBEF. 0 needs no teacher
        forward.
    beta
        Weight of weight perturbation: 1 for Swin and ALBEF; the scripts for DeiT use 0.
    eps
        Perturbation that is free: 1e-3; 0 for Swin.
    hidden_states
        ``"all"`` blocks (the paper), ``"last"`` (what Swin's code does), indices, or name
        patterns of modules. Without patterns a transformers model must be given mappings; in any
        other model the blocks are the outermost rows of modules of one class.
    criterion
        ``(student's output, target) -> loss``; a batch is then ``(inputs, target)``. Without it a
        batch is the model's inputs, and the task's loss is the one the model returns, or none:
        the stage then runs without labels.
    perturbation
        ``"hinge"``, as above, or ``"two_sided"``, ``(d - eps)^2``: the official code, which below
        eps pushes the error up.
    every
        Compute the perturbation on every so many calls; it takes one ``m x n`` product a matrix.
    ignore_padding
        Compare features of real tokens only, in batches with an attention mask. The paper
        compares all tokens; its inputs are images.

    Raises
    ------
    InputError
        When the student has no factorised layer, or the teacher is not the model it was made of.

    Notes
    -----
    The products are formed in float32 at least, under autocast too: half precision does not
    resolve eps. Dropout and drop-path act in the student alone.

    Examples
    --------
    >>> from fullrank.compress.pela import pela_compress
    >>> teacher = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    >>> student = pela_compress(teacher)
    >>> loss = PELALoss(student, teacher, criterion=nn.functional.mse_loss)
    >>> loss((torch.randn(5, 24), torch.randn(5, 24))).backward()
    >>> student[0].first.grad is not None, teacher[0].weight.grad is None
    (True, True)
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        alpha: float = 1.0,
        beta: float = 1.0,
        eps: float = 1e-3,
        hidden_states: Which = "all",
        *,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        perturbation: Form = "hinge",
        every: int = 1,
        ignore_padding: bool = True,
    ) -> None:
        for name, value in {"alpha": alpha, "beta": beta, "eps": eps}.items():
            if not 0 <= value < float("inf"):
                raise InputError(f"{name}={value}; it must not be negative")
        if perturbation not in get_args(Form):
            raise InputError(f"perturbation={perturbation!r}; it is one of {get_args(Form)}")
        if every < 1:
            raise InputError(f"every={every}; it is at least 1")
        self._pairs = _pairs(student, teacher)
        self.teacher = teacher.eval().requires_grad_(False)
        self.alpha, self.beta, self.eps = alpha, beta, eps
        self.criterion, self.form, self.every = criterion, perturbation, every
        self.ignore_padding = ignore_padding
        self.calls = 0
        # Without distillation nobody looks at the blocks, and there need be none.
        self.student_features = Features(student, hidden_states) if alpha else None
        self.teacher_features = Features(teacher, hidden_states) if alpha else None
        self._student = student

    def __call__(self, batch: Any) -> Tensor:
        """Return the weighted sum, to call ``backward`` on."""
        return self.terms(batch).total

    def terms(self, batch: Any) -> PELATerms:
        """Return the weighted sum and its parts; one pass of each model."""
        inputs, target = batch if self.criterion else (batch, None)
        if self.student_features is None:
            output = call(self._student, inputs)
            feature = None
        else:
            output, states = self.student_features.run(inputs, call)
            feature = self.feature_distance(inputs, states)
        task = self.criterion(output, target) if self.criterion else _own_loss(output)
        drift = self.perturbation() if self.beta and self.calls % self.every == 0 else None
        self.calls += 1
        parts = [(1.0, task), (self.alpha, feature), (self.beta, drift)]
        present = [weight * part for weight, part in parts if part is not None]
        if not present:
            raise InputError(
                "nothing to train on: the model returned no loss, alpha and beta are 0"
            )
        total = torch.stack([part.to(present[0]) for part in present]).sum()
        zero = torch.zeros_like(total)
        task, feature, drift = (zero if part is None else part for _, part in parts)
        return PELATerms(total, task, feature, drift, output)

    def feature_distance(self, inputs: Any, states: Sequence[State]) -> Tensor:
        """Run the teacher on the same inputs; mean over blocks of the mean squared difference."""
        assert self.teacher_features is not None
        if self.teacher.training:
            self.teacher.eval()
        with torch.no_grad():
            _, wanted = self.teacher_features.run(inputs, call)
        if [s.value.shape for s in states] != [s.value.shape for s in wanted]:
            raise InputError(
                f"the student's hidden states are {[tuple(s.value.shape) for s in states][:2]}..., "
                f"the teacher's {[tuple(s.value.shape) for s in wanted][:2]}...: it is another "
                "model's teacher"
            )
        distances = [
            _mean_square(s.value, t.value, self._mask(inputs, s))
            for s, t in zip(states, wanted, strict=True)
        ]
        return torch.stack(distances).mean()

    def perturbation(self) -> Tensor:
        """Mean over the factorised matrices of the squared excess of their largest error.

        Raises
        ------
        InputError
            When weights are sharded (FSDP): a part of a product says nothing of its largest entry.
        """
        if any(hasattr(layer.first, "full_tensor") for layer, _ in self._pairs):
            raise InputError(
                "weight perturbation needs whole weights, which FSDP does not hold: beta=0"
            )
        largest = torch.stack(
            [
                largest_error(layer.first, layer.second, _matrix(original))
                for layer, original in self._pairs
            ]
        )
        excess = largest - self.eps
        if self.form == "hinge":
            excess = excess.clamp_min(0)
        return excess.square().mean()

    def _mask(self, inputs: Any, state: State) -> Tensor | None:
        mask = inputs.get(state.mask) if isinstance(inputs, Mapping) else None
        fits = isinstance(mask, Tensor) and mask.shape == state.value.shape[:2]
        return mask if self.ignore_padding and fits else None

    def state_dict(self) -> dict[str, int]:
        """How often it was called, which says when the perturbation is due (with ``every``)."""
        return {"calls": self.calls}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        self.calls = int(state["calls"])


def largest_error(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """``max_ij |(second @ first - weight)_ij|``, differentiable in the factors.

    The entry is found without a graph and computed anew with one: the gradient is that of one
    entry, a row of ``second`` times a column of ``first``, and costs no full-size product.

    >>> A = torch.ones(1, 2, requires_grad=True)
    >>> largest_error(A, torch.ones(2, 1), torch.tensor([[1.0, 3.0], [1.0, 1.0]])).backward()
    >>> A.grad
    tensor([[ 0., -1.]])
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        A, B, W = first.to(wide), second.to(wide), weight.to(wide)
        with torch.no_grad():
            flat = (B @ A - W).abs().argmax().view(1)
        i, j = flat // W.shape[1], flat % W.shape[1]
        entry = (B.index_select(0, i)[0] * A.index_select(1, j)[:, 0]).sum()
        return (entry - W[i, j][0]).abs()


def _mean_square(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    wide = torch.promote_types(student.dtype, torch.float32)
    square = (student.to(wide) - teacher.to(wide)).square()
    if mask is None:
        return square.mean()
    weights = mask.to(square)
    return (square.flatten(2).mean(-1) * weights).sum() / weights.sum().clamp_min(1)


def _own_loss(output: Any) -> Tensor | None:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def _matrix(original: nn.Module) -> Tensor:
    """The teacher's weight ``(out, in)``; a teacher may be partly factorised itself."""
    if isinstance(original, LowRankLinear):
        return original.merged_weight()
    return matricise(original).matrix


def _pairs(student: nn.Module, teacher: nn.Module) -> list[tuple[LowRankLinear, nn.Module]]:
    """Each factorised layer of the student beside the layer it stands for."""
    held = {id(parameter) for parameter in teacher.parameters()}
    if student is teacher or any(id(parameter) in held for parameter in student.parameters()):
        raise InputError(
            "student and teacher share parameters; compress a copy (pela_compress does so unless "
            "inplace=True)"
        )
    originals = dict(canonical_modules(teacher))
    pairs = []
    for name, layer in factorised(student):
        if not isinstance(layer, LowRankLinear):
            # The method is one for linear layers; factorised convolutions are trained as they are.
            continue
        if name not in originals:
            raise InputError(f"the teacher has no layer {name!r}, which the student factorises")
        shape = tuple(_matrix(originals[name]).shape)
        if shape != (layer.out_features, layer.in_features):
            raise InputError(
                f"{name}: the student's factors are for {(layer.out_features, layer.in_features)}"
                f", the teacher's weight is {shape} (out, in)"
            )
        pairs.append((layer, originals[name]))
    if not pairs:
        raise InputError("the student has no factorised layer; make it with pela_compress")
    return pairs
