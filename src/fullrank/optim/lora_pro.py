"""LoRA-Pro: steps of LoRA factors that follow full fine-tuning (ICLR 2025, arXiv 2407.18242)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fullrank.core.errors import InputError
from fullrank.optim import checks as valid
from fullrank.optim.elementwise import Array, adamw_step, alike, decay, fill_directions
from fullrank.optim.foundation import Entry, FullrankOptimizer, Spec
from fullrank.optim.gradients import NonFinite, Verdict
from fullrank.optim.inner import AdamW, Batch
from fullrank.optim.lora_adjust import CHOICES, Choice, PairAlgebra
from fullrank.optim.lora_pairs import (
    LoraPair,
    PairStep,
    check_base,
    sorted_groups,
    stacks,
    warn_half_precision,
)
from fullrank.optim.memory import human_bytes

# From here on the moments of mode="full" are worth a word before they are allocated.
_LARGE = 1 << 30


class LoRAPro(FullrankOptimizer):
    """Trains LoRA factors so that their product moves as closely as it can to full fine-tuning.

    Each step the gradients of A and B are adjusted (:func:`adjust_lora_grads`): the change of
    ``W = W0 + s B A`` is then the one closest to the step on W itself. In mode ``"full"`` Adam
    normalises that change, in mode ``"efficient"`` the adjusted gradients. What is trainable
    beside the pairs gets plain AdamW, or SGD.

    Parameters
    ----------
    pairs_or_model
        A model with LoRA layers (PEFT's; see :func:`create_lorapro_optimizer`), whose pairs are
        found by module and whose other trainable parameters make up a second group; or pairs
        ``(A, B, scaling)``, ``(A, B, scaling, base weight)`` or :class:`LoraPair`.
    lr
        2e-5 (paper).
    optimizer
        ``"adamw"`` (default) or ``"sgd"``. SGD has no momentum, and no use for mode, betas and
        eps.
    mode
        ``"full"`` (default; the current official code): moments of shape ``(m, n)`` over the
        change of W, as much memory as AdamW of full fine-tuning takes for these matrices.
        ``"efficient"``: moments over the adjusted gradients, as much as LoRA with AdamW; Adam
        then rescales A and B entry by entry after the adjustment.
    x
        ``"sylvester"`` (default), ``"zero"`` or ``"symmetry"``: which of the equivalent
        adjustments is taken.
    betas, eps
        (0.9, 0.999) and 1e-8, beside the bias-corrected root as in ``torch.optim.AdamW``.
    weight_decay
        Decoupled, before the update: 0. In mode ``"full"``, and with ``decay_base``, the product
        decays by ``1 - lr weight_decay`` (each factor by its root), otherwise each factor.
    delta
        Damping of the factors' Gram matrices: 1e-8.
    state_dtype
        Dtype of the moments; by default the weight's, float32 at least. ``torch.bfloat16`` is
        what the official code's first release used.
    decay_base
        Decay the frozen weight W0 with the product. Off by default: it changes the base model,
        so the adapter alone no longer is what was trained.
    relative_delta
        Count ``delta`` in mean eigenvalues of the Gram matrices.
    nonfinite
        See :class:`FullrankOptimizer`.

    Raises
    ------
    InputError
        On values out of range; a model without LoRA pairs; factors that are flattened or sharded
        (FSDP, ZeRO), at the start or later; a step in which one half of a pair has a gradient.

    Warns
    -----
    UserWarning
        On LoRA factors that are no plain pair (embeddings, grouped convolutions, experts), which
        are stepped without adjustment; on factors in half precision; on moments of a GiB or more
        with ``mode="full"``.

    Notes
    -----
    Clip, and unscale, before the step: the adjustment is linear in the gradients, so clipping by
    the global norm shortens the step as it does for the pair's own gradients. The current
    official code fixes s = 2, starts the bias correction at t = 2, and clips after the moments;
    none of that is done here. Under DDP gradients are averaged before the step, and every
    process computes the same adjustment.

    Examples
    --------
    >>> A, B = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(6, 2))
    >>> optimizer = LoRAPro([(A, B, 2.0)], lr=0.01)
    >>> (2.0 * B @ A @ torch.ones(8)).sum().backward()
    >>> _ = optimizer.step()
    >>> {name: tuple(value.shape) for name, value in optimizer.state[A].items()}
    {'step': (), 'unseen': (), 'exp_avg': (6, 8), 'exp_avg_sq': (6, 8)}
    """

    separable: ClassVar[bool] = False  # a pair's two factors are stepped together
    checks: ClassVar[dict[str, valid.Check]] = {
        "lr": valid.at_least(0.0),
        "optimizer": valid.one_of("adamw", "sgd"),
        "mode": valid.one_of("full", "efficient"),
        "x": valid.one_of(*CHOICES),
        "betas": valid.pair(valid.decay_factor),
        "eps": valid.at_least(0.0),
        "weight_decay": valid.at_least(0.0),
        "delta": valid.at_least(0.0),
        "relative_delta": valid.truth,
        "decay_base": valid.truth,
    }

    def __init__(
        self,
        pairs_or_model: nn.Module | Iterable[Any],
        lr: float = 2e-5,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        mode: Literal["full", "efficient"] = "full",
        x: Choice = "sylvester",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 1e-8,
        state_dtype: torch.dtype | None = None,
        decay_base: bool = False,
        *,
        relative_delta: bool = False,
        nonfinite: NonFinite = "skip",
    ) -> None:
        if state_dtype is not None and not getattr(state_dtype, "is_floating_point", False):
            raise InputError(f"state_dtype={state_dtype!r}; it is a floating-point dtype or None")
        self.state_dtype = state_dtype
        self._pairs, groups = sorted_groups(pairs_or_model)
        self._pair_of = {half: pair for pair in self._pairs for half in (pair.A, pair.B)}
        if len(self._pair_of) < 2 * len(self._pairs):
            raise InputError("a factor is in two pairs; each may be in one")
        super().__init__(groups, locals())
        warn_half_precision(self._pairs)
        self._warn_of_memory()

    @property
    def pairs(self) -> list[LoraPair]:
        """The pairs that are adjusted."""
        return list(self._pairs)

    # -- groups and state ------------------------------------------------------------------

    def check_group(self, group: dict[str, Any]) -> None:
        """Base weights that are to decay must be there."""
        for param in group["params"]:
            pair = self._pair_of.get(param)
            if pair is not None and {**self.defaults, **group}["decay_base"]:
                check_base(pair)

    def state_spec(self, param: Tensor, group: dict[str, Any]) -> Spec:
        """Adam's moments: a pair's of the weight's shape with A, or each parameter's own."""
        if group["optimizer"] == "sgd":
            return {}
        shape = tuple(param.shape)
        pair = self._pair_of.get(param)
        if pair is not None and group["mode"] == "full":
            if param is pair.B:
                return {}
            shape = pair.shape[:2]
        dtype = self.state_dtype or torch.promote_types(param.dtype, torch.float32)
        return {"exp_avg": (shape, dtype), "exp_avg_sq": (shape, dtype)}

    def _warn_of_memory(self) -> None:
        size = sum(
            math.prod(shape) * dtype.itemsize
            for pair in self._pairs
            for shape, dtype in self.expected_state(pair.A).values()
        )
        if size >= _LARGE:
            warnings.warn(
                f"the moments will take {human_bytes(size)}, as in full fine-tuning of these "
                "weights; mode='efficient' keeps them as small as the factors, "
                "state_dtype=torch.bfloat16 halves them",
                stacklevel=3,
            )

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = {
            "state_dtype": self.state_dtype,
            "_pairs": self._pairs,
            "_pair_of": self._pair_of,
        }
        return {**super().__getstate__(), **kept}

    # -- the step --------------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; see :meth:`FullrankOptimizer.step`.

        Raises
        ------
        InputError
            Also when something has put other tensors in the place of the factors, and when one
            half of a pair has a gradient and the other none.
        """
        held = {id(param) for group in self.param_groups for param in group["params"]}
        for pair in self._pairs:
            if id(pair.A) not in held or id(pair.B) not in held:
                raise InputError(
                    f"the factors of {pair.name} are no longer in the param groups: DeepSpeed's "
                    "ZeRO and FSDP put flattened shards there, which cannot be adjusted. Use DDP"
                )
        return super().step(closure)

    def due(self, entry: Entry) -> bool:
        """Nothing is fitted to a gradient; but a pair needs both of its own."""
        pair = self._pair_of.get(entry.param)
        if pair is not None:
            for letter, half in (("A", pair.A), ("B", pair.B)):
                if half.grad is None:
                    raise InputError(
                        f"{letter} of {pair.name} has no gradient, but its other half has; "
                        "freeze both or none"
                    )
        return False

    def advance(self, entries: list[Entry], verdict: Verdict) -> None:
        """Adjust and step the pairs, and step the other parameters."""
        found = {entry.param: entry for entry in entries}
        bases: set[int] = set()
        for g, group in enumerate(self.param_groups):
            own = [entry for entry in entries if entry.place[0] == g]
            others = [Array(e.param, e.grad, e.state) for e in own if e.param not in self._pair_of]
            self._elementwise(group, others, verdict, 1.0 - float(group["lr"]) * _wd(group))
            steps = [
                PairStep(pair, entry, found[pair.B])
                for entry in own
                if (pair := self._pair_of.get(entry.param)) is not None and entry.param is pair.A
            ]
            for stack in stacks(steps):
                self._step_pairs(group, stack, verdict)
            if group["decay_base"]:
                _decay_bases(group, [step.pair for step in steps], verdict, bases)

    def _step_pairs(self, group: dict[str, Any], steps: list[PairStep], verdict: Verdict) -> None:
        pairs = [step.pair for step in steps]
        s, skip = pairs[0].scaling, verdict.skip.get(pairs[0].A.device)
        algebra = PairAlgebra.of(
            torch.stack([pair.A.flatten(1) for pair in pairs]),
            torch.stack([pair.B.flatten(1) for pair in pairs]),
            group["delta"],
            group["relative_delta"],
        )
        g_A = torch.stack([step.A.grad.flatten(1) for step in steps])
        g_B = torch.stack([step.B.grad.flatten(1) for step in steps])
        adam = group["optimizer"] == "adamw"
        if adam and group["mode"] == "full":
            g_A, g_B = self._normalised(group, steps, algebra, (g_A, g_B), skip)
        dA, dB = algebra.adjust(g_A, g_B, s, group["x"])
        keep = 1.0 - float(group["lr"]) * _wd(group)
        if group["decay_base"] or (adam and group["mode"] == "full"):
            keep = math.sqrt(max(keep, 0.0))
        arrays = [
            Array(entry.param, direction.view(entry.param.shape), entry.state)
            for i, step in enumerate(steps)
            for entry, direction in ((step.A, dA[i]), (step.B, dB[i]))
        ]
        if adam and group["mode"] == "efficient":
            self._elementwise(group, arrays, verdict, keep)
        else:
            _descend(arrays, float(group["lr"]), keep, skip)

    def _normalised(
        self,
        group: dict[str, Any],
        steps: list[PairStep],
        algebra: PairAlgebra,
        grads: tuple[Tensor, Tensor],
        skip: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Adam's direction on the whole weight, seen as gradients of the factors.

        One matrix at a time: no more than two arrays of a weight's size beside the moments.
        """
        s = steps[0].pair.scaling
        left, right = algebra.equivalent_factors(*grads, s)
        new_A, new_B = torch.empty_like(algebra.A), torch.empty_like(algebra.B)
        for i, step in enumerate(steps):
            array = Array(step.pair.A, left[i] @ right[i], step.A.state)
            age, _ = next(alike([array], self._device_knows))
            batch = Batch(group=group, age=age, small=[array.grad], states=[array.state], skip=skip)
            fill_directions(batch, AdamW("corrected"))
            (direction,) = batch.direction
            torch.mm(algebra.B[i].mT, direction, out=new_A[i]).mul_(s)
            torch.mm(direction, algebra.A[i].mT, out=new_B[i]).mul_(s)
        return new_A, new_B

    def _elementwise(
        self, group: dict[str, Any], arrays: list[Array], verdict: Verdict, keep: float
    ) -> None:
        if group["optimizer"] == "sgd":
            for array in arrays:
                skip = verdict.skip.get(array.weight.device)
                _descend([array], float(group["lr"]), keep, skip)
            return
        inner = AdamW("corrected")
        for age, chunk in alike(arrays, self._device_knows):
            skip = verdict.skip.get(chunk[0].weight.device)
            adamw_step(group, chunk, inner, age, skip, keep=keep, decay_first=True)


def _wd(group: dict[str, Any]) -> float:
    return float(group["weight_decay"])


def _descend(arrays: list[Array], lr: float, keep: float, skip: Tensor | None) -> None:
    """``W <- keep W - lr G`` for each."""
    for array in arrays:
        grad = array.grad if skip is None else torch.where(skip, 0.0, array.grad)
        decay(array.weight, keep, skip).sub_(grad, alpha=lr)


def _decay_bases(
    group: dict[str, Any], pairs: list[LoraPair], verdict: Verdict, done: set[int]
) -> None:
    """Decay each frozen weight once, whatever adapters sit on it."""
    keep = max(1.0 - float(group["lr"]) * _wd(group), 0.0)
    for pair in pairs:
        base = check_base(pair)
        if id(base) not in done:
            done.add(id(base))
            decay(base.detach(), keep, verdict.skip.get(base.device))


def create_lorapro_optimizer(model: nn.Module, **options: Any) -> LoRAPro:
    """Make :class:`LoRAPro` for a PEFT model, as PEFT's ``create_loraplus_optimizer`` does.

    Parameters
    ----------
    model
        A ``PeftModel`` with trainable LoRA adapters; ranks, scalings and rsLoRA are read from its
        layers. Wrapped in DDP or compiled is fine.
    **options
        Arguments of :class:`LoRAPro`.

    Returns
    -------
    LoRAPro
        With the pairs in its first group and what else is trainable in a second one.

    Raises
    ------
    InputError
        When the model has no trainable LoRA pair.

    Examples
    --------
    In the Hugging Face ``Trainer``, override ``create_optimizer``::

        class LoRAProTrainer(Trainer):
            def create_optimizer(self, model=None):
                if self.optimizer is None:
                    lr = self.args.learning_rate
                    self.optimizer = create_lorapro_optimizer(self.model, lr=lr)
                return self.optimizer
    """
    return LoRAPro(model, **options)
