"""LIFT: fine-tuning of the principal weights alone (ICML 2025, arXiv 2506.00772)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.core.plan import RankPlan
from fullrank.optim import checks as valid
from fullrank.optim.elementwise import Array, adamw_step, alike
from fullrank.optim.foundation import Entry, FullrankOptimizer, Spec, State, own_part
from fullrank.optim.gradients import NonFinite, Verdict
from fullrank.optim.inner import AdamW
from fullrank.optim.inner.adamw import EpsMode
from fullrank.optim.mask import PrincipalMask, SVDKind, budget, check_mask
from fullrank.optim.mask_sharded import SpreadMask
from fullrank.optim.planned import planned_groups
from fullrank.optim.sharded import check_placements, gathered, is_sharded, local, norm

_HALF = (torch.bfloat16, torch.float16)
# The paper's ranks; as the filter of narrower matrices it is their shorter side.
_RANK = 128


@dataclass(slots=True)
class _Masked(Array):
    """The trained entries of one matrix, and where they go back to."""

    param: Tensor
    mask: PrincipalMask | SpreadMask


class LIFT(FullrankOptimizer):
    """AdamW on the entries of each weight that are largest after rank reduction; others rest.

    Of an ``(m, n)`` matrix ``k = min(r (m + n), m n)`` entries are trained, as many as a rank-r
    LoRA has parameters, at full rank: the k largest of its best rank-R approximation
    (:func:`principal_mask`). Every ``update_interval`` steps they are chosen anew from the
    current weight; entries that stay keep their moments, new ones start at 0.

    Parameters
    ----------
    params
        Parameters or named parameters, of which matrices are masked; or param groups
        (:func:`lift_param_groups`), of which those with ``rank``, matrices all, are masked. What
        is not gets AdamW.
    lr
        1e-4 (paper, LLaMA-2-7B; 2e-4 for 3.2-1B and 3-8B).
    betas, eps
        (0.9, 0.95) and 1e-6 (official code). A second factor of 0.999 would give an entry that
        joins late a first step of 3 lr.
    weight_decay
        Decoupled, after the update, on trained entries only: 0.
    rank
        r, the budget: 128 (official README). A group may list one a parameter.
    lra_rank
        R, the filter: 128; best near r (paper). Cut to the shorter side of narrower matrices.
        A group may list one a parameter; None is 128.
    update_interval
        Steps between two choices: 400 (official MATH-10K settings; paper: 50 to 1000 all work).
        The first new choice is made at the start of step ``update_interval``.
    svd
        ``"full"``, or ``"randomized"`` for large matrices; see :func:`principal_mask`. Its sketch
        depends on the matrix's place and the step alone: runs and processes agree.
    eps_mode
        ``"uncorrected"`` (default; official code): eps beside the root of the second moment as it
        is. ``"corrected"`` (paper): beside the bias-corrected root.
    master_weights
        Keep trained entries of weights in half precision in float32 too (default), so that small
        updates add up. A weight that is changed from outside is taken as it is then.
    plan
        A plan of purpose ``"optimizer"``, in place of ``rank``; ``params`` are then named
        parameters. Its entries' options may hold ``lra_rank``.
    nonfinite
        See :class:`FullrankOptimizer`. A choice that falls on a skipped step is made at the next.

    Raises
    ------
    InputError
        On values out of range; ``lra_rank`` (but 128) above the shorter sides of all weights of a
        group, one listed above that of its own; a tensor in a masked group that is no matrix, is
        sharded by ZeRO-3, or quantised; sparse gradients.

    Warns
    -----
    UserWarning
        When no group has a rank, or parameters beside the matrices are none.

    Notes
    -----
    State of a masked matrix: two moments and one index (int32 while they fit) an entry, with
    half-precision weights a float32 copy too. Where ``k = m n`` the matrix gets plain AdamW.
    Under FSDP2 weights are put together where entries are chosen; a step exchanges entries only.
    ``torch.nn.utils.clip_grad_norm_`` counts gradients of entries that rest;
    :meth:`clip_grad_norm_` here does not.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.diag(torch.arange(1.0, 9.0)))
    >>> optimizer = LIFT([weight], rank=1, lra_rank=2, lr=0.1)
    >>> (weight - 0.5).square().sum().backward()
    >>> before = weight.detach().clone()
    >>> _ = optimizer.step()
    >>> int((weight != before).sum())
    16
    """

    planned: ClassVar[tuple[str, ...]] = ("lra_rank",)
    checks: ClassVar[dict[str, valid.Check]] = {
        "lr": valid.at_least(0.0),
        "betas": valid.pair(valid.decay_factor),
        "eps": valid.at_least(0.0),
        "weight_decay": valid.at_least(0.0),
        "rank": valid.rank,
        "lra_rank": valid.rank,
        "update_interval": valid.whole,
        "svd": valid.one_of("full", "randomized"),
        "eps_mode": valid.one_of("uncorrected", "corrected"),
        "master_weights": valid.truth,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int = _RANK,
        lra_rank: int = _RANK,
        update_interval: int = 400,
        svd: SVDKind = "full",
        *,
        eps_mode: EpsMode = "uncorrected",
        master_weights: bool = True,
        plan: RankPlan | None = None,
        nonfinite: NonFinite = "skip",
    ) -> None:
        valid.whole("rank", rank)
        valid.whole("lra_rank", lra_rank)
        groups: list[Any] = [params] if isinstance(params, Tensor) else list(params)
        if plan is not None:
            groups = planned_groups(groups, plan, None if rank == _RANK else rank, self.planned)
        elif groups and not isinstance(groups[0], dict):
            groups = [{"params": groups, "rank": _matrices_alone(groups, rank)}]
        self._spread: dict[Tensor, SpreadMask] = {}
        # A group that gives no rank gets AdamW.
        super().__init__(groups, {**locals(), "rank": None})
        if all(rank is None for group in self.param_groups for rank in valid.ranks_of(group)):
            warnings.warn(
                "no param group has a rank: every parameter is stepped by AdamW. See "
                "fullrank.optim.lift_param_groups",
                stacklevel=2,
            )

    # -- groups and state ------------------------------------------------------------------

    def check_group(self, group: dict[str, Any]) -> None:
        """A group with a rank holds whole matrices only."""
        _check_lra_ranks(group)
        for i, (param, rank) in enumerate(zip(group["params"], valid.ranks_of(group), strict=True)):
            if rank is None:
                continue
            name = self._name(len(self.param_groups) - 1, i)
            try:
                check_mask(param.shape, rank, _lra_rank(group, i))
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            if hasattr(param, "ds_id"):
                raise InputError(
                    f"{name} is sharded by ZeRO-3; a mask needs to find its entries. Use FSDP2 "
                    "(torch.distributed.fsdp.fully_shard) or DDP, or a group without rank for it"
                )
            if is_sharded(param):
                check_placements(param, name)

    def _mask(self, param: Tensor, group: dict[str, Any]) -> PrincipalMask | None:
        """The (not yet fitted) mask of a parameter, None where all of it is trained."""
        index = self.place_of(param)[1]
        rank = valid.ranks_of(group)[index]
        if rank is None or budget(param.shape, rank) == param.numel():
            return None
        return PrincipalMask(rank, _lra_rank(group, index), group["svd"])

    def state_spec(self, param: Tensor, group: dict[str, Any]) -> Spec:
        """Moments; with a mask its indices, when it was chosen last, and a float32 copy."""
        dtype = torch.promote_types(param.dtype, torch.float32)
        mask = self._mask(param, group)
        if mask is None:
            shape = tuple(param.shape)
            return {"exp_avg": (shape, dtype), "exp_avg_sq": (shape, dtype)}
        m, n = param.shape
        shape = mask.small_shape((m, n))
        spec: Spec = {
            **mask.expected((m, n), param.dtype),
            "refreshed": ((), torch.float32),
            "exp_avg": (shape, dtype),
            "exp_avg_sq": (shape, dtype),
        }
        if param.dtype in _HALF and group["master_weights"]:
            spec["master"] = (shape, torch.float32)
        return spec

    def projects(self, param: Tensor) -> bool:
        """Whether a parameter is masked."""
        return self._mask(param, self.param_groups[self.place_of(param)[0]]) is not None

    def home(self, name: str, param: Tensor) -> torch.device:
        """The schedule is the host's."""
        return torch.device("cpu") if name == "refreshed" else super().home(name, param)

    def fill(self, param: Tensor, group: dict[str, Any], state: State) -> None:
        """Choose the first mask, from the weight before its first step."""
        mask = self._mask(param, group)
        if mask is not None:
            weight = gathered(param)
            fitted = self._fit(mask, param, weight, step=0)
            state["indices"].copy_(fitted.state["indices"])
            if "master" in state:
                state["master"].copy_(fitted.down(weight))

    def _fit(self, mask: PrincipalMask, param: Tensor, weight: Tensor, step: int) -> PrincipalMask:
        generator = None
        if mask.svd == "randomized":
            g, i = self.place_of(param)
            generator = torch.Generator().manual_seed((g * 1_000_003 + i) * 1_000_003 + step)
        try:
            return mask.fit(weight, weight, generator)
        except InputError as error:
            raise InputError(f"{self.name_of(param)}: {error}") from error

    # -- the step --------------------------------------------------------------------------

    def due(self, entry: Entry) -> bool:
        """Whether step ``update_interval``, or a multiple, is reached since the last choice."""
        if "indices" not in entry.state:
            return False
        interval = entry.group["update_interval"]
        now, last = int(entry.state["step"].item()) + 1, int(entry.state["refreshed"].item())
        return bool(now // interval > last // interval)

    def advance(self, entries: list[Entry], verdict: Verdict) -> None:
        """Choose masks that are due; then Adam on the trained entries of all."""
        for entry in entries:
            if entry.due:
                self._refresh(entry)
        for g, group in enumerate(self.param_groups):
            inner = AdamW(group["eps_mode"])
            keep = 1.0 - float(group["lr"]) * group["weight_decay"]
            own = (self._array(entry) for entry in entries if entry.place[0] == g)
            for age, chunk in alike(own, self._device_knows):
                skip = verdict.skip.get(chunk[0].weight.device)
                adamw_step(group, chunk, inner, age, skip, keep=keep, decay_first=False)
                for array in chunk:
                    if isinstance(array, _Masked):
                        array.mask.put(array.param, array.weight)

    def _array(self, entry: Entry) -> Array:
        param, state = entry.param, entry.state
        if "indices" not in state:
            part = own_part(entry)
            return Array(part.param, part.grad, part.state)
        mask = self._entries_of(entry)
        weight, grad = mask.down(param), mask.down(entry.grad)
        if "master" in state:
            master = state["master"]
            # Where the weight is not what was written last, somebody else has set it.
            same = master.to(weight.dtype) == weight
            weight = master.copy_(torch.where(same, master, weight.to(master.dtype)))
            grad = grad.to(master.dtype)
        return _Masked(weight, grad, state, param, mask)

    def _fitted(self, entry: Entry) -> PrincipalMask:
        mask = self._mask(entry.param, entry.group)
        assert mask is not None
        return mask.restore(entry.state)

    def _entries_of(self, entry: Entry) -> PrincipalMask | SpreadMask:
        if not is_sharded(entry.param):
            return self._fitted(entry)
        if entry.param not in self._spread:
            self._spread[entry.param] = SpreadMask(entry.state["indices"], entry.param)
        return self._spread[entry.param]

    def _refresh(self, entry: Entry) -> None:
        param, state = entry.param, entry.state
        old, weight = self._fitted(entry), gathered(entry.param)
        new = self._fit(old, param, weight, step=int(state["step"].item()))
        new.transport(old, [state["exp_avg"], state["exp_avg_sq"]], "keep")
        if "master" in state:
            kept, place = new.overlap(old)
            master, fresh = state["master"], new.down(weight)
            master.copy_(torch.where(kept, master[place], fresh.to(master.dtype)))
        state["indices"].copy_(new.state["indices"])
        state["refreshed"].copy_(state["step"])
        self._spread.pop(param, None)

    def forget(self) -> None:
        """Drop where the entries of spread weights are."""
        super().forget()
        self._spread.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_spread": {}}

    # -- beside the step -------------------------------------------------------------------

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that those of the trained entries have at most this norm.

        Parameters
        ----------
        max_norm
            Bound on the Euclidean norm over all groups.

        Returns
        -------
        Tensor
            The norm before, a scalar.
        """
        entries = list(self._entries())
        if not entries:
            return torch.zeros(())
        trained = [
            self._array(entry).grad if "indices" in entry.state else entry.grad for entry in entries
        ]
        norms = [norm(grad) for grad in trained]
        total: Tensor = torch.linalg.vector_norm(torch.stack([each.to(norms[0]) for each in norms]))
        factor = (max_norm / (total + 1e-6)).clamp_max(1.0)
        for entry in entries:
            grad = local(entry.grad)
            grad.mul_(factor.to(grad))
        return total

    def masks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each masked parameter that has been stepped with its ``(m, n)`` bool mask."""
        for group in self.param_groups:
            for param in group["params"]:
                indices = self.state.get(param, {}).get("indices")
                if indices is not None:
                    mask = torch.zeros(param.numel(), dtype=torch.bool, device=param.device)
                    yield param, mask.index_fill_(0, indices.long(), True).view(param.shape)


def _matrices_alone(params: list[Any], rank: int) -> int | list[int | None]:
    """One rank for all that can be masked, as long as something can be."""
    tensors = [each[1] if isinstance(each, tuple) else each for each in params]
    # ZeRO-3 leaves parameters without elements, which are refused by name.
    fits = [tensor.dim() == 2 or hasattr(tensor, "ds_id") for tensor in tensors]
    if all(fits) or not any(fits):
        return rank
    warnings.warn(
        f"{fits.count(False)} parameters are no matrices (the first of shape "
        f"{tuple(tensors[fits.index(False)].shape)}); they are stepped by AdamW",
        stacklevel=3,
    )
    return [rank if each else None for each in fits]


def _lra_rank(group: dict[str, Any], index: int) -> int:
    """R of one parameter: what is listed for it as it is, one for all cut to the shorter side."""
    value, shape = group["lra_rank"], group["params"][index].shape
    found: int | None = value
    if isinstance(value, list | tuple):
        found = value[index]
        if found is not None:
            return found
    return min(_RANK if found is None else found, *shape) if len(shape) else _RANK


def _check_lra_ranks(group: dict[str, Any]) -> None:
    value, count = group["lra_rank"], len(group["params"])
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise InputError(
                f"a group of {count} parameters lists {len(value)} lra_ranks; give one for all, or "
                "one a parameter"
            )
        return
    ranks = valid.ranks_of(group)
    shapes = [p.shape for p, rank in zip(group["params"], ranks, strict=True) if rank is not None]
    most = max((min(shape, default=0) for shape in shapes if len(shape) == 2), default=None)
    if most is not None and value not in (None, _RANK) and value > most:
        raise InputError(f"lra_rank={value}; for these weights it can be {most} at most")
