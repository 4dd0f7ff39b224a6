"""FRUGAL: a stateful rule in a changing subspace, a state-free one in the rest (2411.07837)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.core.plan import RankPlan
from fullrank.optim import checks as valid
from fullrank.optim.base import ProjectionHook, SubspaceOptimizer
from fullrank.optim.blocks import BlockOrder, active_blocks, check_blocks
from fullrank.optim.coordinates import Coordinate, Coordinates, share
from fullrank.optim.foundation import COUNTERS, Entry, Spec, State
from fullrank.optim.gradients import NonFinite, Verdict
from fullrank.optim.inner import AdamW, InnerUpdate, Lion, Momentum
from fullrank.optim.iterative import IterativeSubspace
from fullrank.optim.matrices import Parts, make_slot, matrix_shape
from fullrank.optim.outside import StateFree, StateFreeRule
from fullrank.optim.projected import Gemm, Refresh, gemm_dtype
from fullrank.optim.random_basis import RandomSubspace
from fullrank.optim.subspace import ProjType, SVDSubspace, side_of
from fullrank.optim.whole import Everything, Identity, Nothing

Space = Literal["block", "columns", "rows", "randk", "svd", "random"]
Stateful = Literal["adamw", "lion", "sgdm"]

# Of a tensor's state: the period it was last looked at in, negative where it was inactive.
_BLOCK: Spec = {"block": ((), torch.float32)}


class FrugalAdamW(SubspaceOptimizer):
    """AdamW in a changing part of every weight, signSGD in the rest: every step is of full rank.

    Only the part in the subspace has optimizer state. Every ``update_gap`` steps a new one is
    chosen, and its moments and their age start over. With ``R = down(G)`` and Adam's direction D:
    ``W <- (1 - lr wd) W``, then ``W <- W - lr p (up(D) + f sign(G - up(R)))`` with the factors
    ``p = proj_params_lr_scale`` and ``f = state_free_lr_scale``.

    Parameters
    ----------
    params
        Param groups: one with ``is_proj_params=True`` is divided so, one without gets AdamW
        (embeddings, norms, the head; see :func:`frugal_param_groups`). Parameters or named
        parameters with ``rank`` or ``plan``; or parameters beside ``proj_params``. Every argument
        but ``proj_params`` and the last four may also be a group's key.
    lr, betas, eps, weight_decay
        1e-3, (0.9, 0.999; for Lion (0.9, 0.99) is usual), 1e-8 beside the corrected root, and 0;
        decay comes before the step.
    subspace
        ``"block"``: whole tensors, some of a group at a time (the paper's choice for pre-training).
        ``"columns"``, ``"rows"``, ``"randk"`` (entries): at random. ``"svd"``: leading singular
        vectors, ``"random"``: random orthonormal ones.
    density
        Part of each weight, or of a group's tensors, that has state: 0.25. 0 keeps none.
    update_gap
        Steps between two choices: 200 (500 for 7B and for GLUE). A matrix counts the steps that
        brought it a gradient; blocks go by their group, which counts those that brought any of
        its tensors one (in the backward pass: the tensor that has had most).
    state_free
        ``"sign_sgd"``, ``"sgd"``, or None for nothing outside.
    state_free_lr_scale
        f: 1 (0.1 in fine-tuning).
    proj_params_lr_scale
        p: 1.
    block_order
        ``"descending"``, ``"ascending"``, ``"mirror"``, ``"random"``: in which order tensors get
        their turn.
    reset
        Start the moments over at every choice. False reads old moments in a new subspace, and
        warns; blocks always start over.
    stateful
        The rule inside: ``"adamw"``, ``"lion"`` or ``"sgdm"`` (with ``momentum``, from zero).
    momentum
        Of ``"sgdm"``: 0.9.
    rank
        For a group: how many columns, rows or directions, in place of ``density``.
    proj_type
        Which side ``"svd"`` and ``"random"`` project, as for :class:`GaLoreAdamW`.
    refresh
        How ``"svd"`` finds its vectors, as for :class:`GaLoreAdamW`.
    generator
        Seed of the random choices: a number, or a generator to draw it from; None is 0. Draws
        depend on it, the place of the weight and its steps alone: a resumed run finds the same.
    gemm, state_bits, min_8bit_size, stochastic_rounding
        As for :class:`GaLoreAdamW`; ``gemm`` is for ``"svd"`` and ``"random"``.
    proj_params
        Parameters of a group of their own with ``is_proj_params=True``.
    plan, nonfinite, projection_hook
        See :class:`SubspaceOptimizer`. The hook's side is that of the projection, ``"columns"``,
        ``"rows"`` or ``"randk"`` (it returns indices, flat ones for entries, which are then saved)
        or ``"block"`` (it returns whether the tensor is active).

    Raises
    ------
    InputError
        On values out of range, vectors where columns or directions are asked for, an odd number of
        mirrored blocks, parameters that are not real floats, sparse gradients.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(16, 8)
    >>> groups = [{"params": [model.weight], "is_proj_params": True}, {"params": [model.bias]}]
    >>> optimizer = FrugalAdamW(groups, subspace="columns", density=0.25)
    >>> model(torch.ones(4, 16)).square().sum().backward()
    >>> _ = optimizer.step()
    >>> tuple(optimizer.state[model.weight]["exp_avg"].shape)
    (8, 4)
    """

    decay_first: ClassVar[bool] = True
    gap_key: ClassVar[str] = "update_gap"
    checks: ClassVar[dict[str, valid.Check]] = {
        **valid.ADAM,
        "is_proj_params": valid.truth,
        "subspace": valid.one_of(*get_args(Space)),
        "density": valid.fraction,
        "rank": valid.rank,
        "update_gap": valid.whole,
        "state_free": valid.one_of(*get_args(StateFreeRule), None),
        "state_free_lr_scale": valid.at_least(0.0),
        "proj_params_lr_scale": valid.at_least(0.0),
        "block_order": valid.one_of(*get_args(BlockOrder)),
        "reset": valid.truth,
        "stateful": valid.one_of(*get_args(Stateful)),
        "momentum": valid.decay_factor,
        "proj_type": valid.one_of(*get_args(ProjType)),
        "refresh": valid.one_of(*get_args(Refresh)),
        **valid.KEPT,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        subspace: Space = "block",
        density: float = 0.25,
        update_gap: int = 200,
        state_free: StateFreeRule | None = "sign_sgd",
        state_free_lr_scale: float = 1.0,
        proj_params_lr_scale: float = 1.0,
        block_order: BlockOrder = "descending",
        reset: bool = True,
        stateful: Stateful = "adamw",
        momentum: float = 0.9,
        rank: int | None = None,
        proj_type: ProjType = "std",
        refresh: Refresh = "svd",
        gemm: Gemm | None = None,
        state_bits: Literal[32, 8] = 32,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = False,
        generator: torch.Generator | int | None = None,
        proj_params: Iterable[Any] | None = None,
        plan: RankPlan | None = None,
        nonfinite: NonFinite = "skip",
        projection_hook: ProjectionHook | None = None,
    ) -> None:
        arguments = {**locals(), "is_proj_params": False}
        if proj_params is not None:
            own = list(proj_params)
            ids = {id(_tensor(each)) for each in own}
            rest = [each for each in params if id(_tensor(each)) not in ids]
            params = [{"params": rest}, {"params": own, "is_proj_params": True}]
        super().__init__(params, arguments)

    # -- which part of a weight ------------------------------------------------------------

    def parts(self, group: dict[str, Any]) -> Parts:
        """The stateful rule inside; outside, in a projectable group, the state-free one."""
        scale = float(group["proj_params_lr_scale"]) if _divided(group) else 1.0
        outside = None
        if _divided(group) and group["state_free"] is not None:
            outside = StateFree(group["state_free"], float(group["state_free_lr_scale"]))
        return Parts(self._rule(group), outside, scale=scale, scale_whole=scale)

    @staticmethod
    def _rule(group: dict[str, Any]) -> InnerUpdate:
        bits, least = group["state_bits"], group["min_8bit_size"]
        if group["stateful"] == "lion":
            return Lion(bits, least)
        if group["stateful"] == "sgdm":
            return Momentum(group["momentum"] > 0, bits, least)
        return AdamW("corrected", bits, least)

    def moment_policy(self, group: dict[str, Any]) -> Literal["keep", "reset"]:
        """What becomes of moments at a new choice."""
        return "reset" if group["reset"] else "keep"

    def check_group(self, group: dict[str, Any]) -> None:
        """Values that do not go together, and vectors that cannot be divided."""
        if not _divided(group):
            return
        if group["subspace"] == "block":
            if any(rank is not None for rank in self.ranks(group)):
                raise InputError(
                    "subspace='block' divides a group's tensors by density, not rank; give "
                    "density= and is_proj_params=True, or another subspace, e.g. 'columns'"
                )
            check_blocks(group["block_order"], _active_count(group))
            return
        super().check_group(group)
        for i, param in enumerate(group["params"]):
            if group["is_proj_params"] and param.dim() < 2:
                name = repr(group["param_names"][i]) if "param_names" in group else str(i)
                raise InputError(
                    f"subspace={group['subspace']!r} divides matrices; parameter {name} of shape "
                    f"{tuple(param.shape)} is none: put it in a group without is_proj_params"
                )
        if not group["reset"]:
            warnings.warn(
                "reset=False reads the moments of one subspace in the next, where they mean "
                "something else",
                stacklevel=5,
            )

    def choose(self, param: Tensor, group: dict[str, Any], place: tuple[int, int]) -> Any:
        """Return the subspace: of none of the directions it is nothing, of all the whole space."""
        if not _divided(group):
            return Identity()
        if group["subspace"] == "block":
            return Identity() if self._is_active(param, group, place) else Nothing()
        rank = self.ranks(group)[place[1]]
        if param.dim() < 2 or (rank is None and not group["is_proj_params"]):
            return Identity()
        shape = matrix_shape(param.shape)
        if group["subspace"] in get_args(Coordinate):
            side = cast(Coordinate, group["subspace"])
            m, n = shape
            total = {"columns": n, "rows": m, "randk": m * n}[side]
            count = share(total, group["density"]) if rank is None else min(rank, total)
            if count in (0, total):
                return Everything() if count else Nothing()
            return Coordinates(count, side, shape)
        return self._directions(group, rank, shape)

    @staticmethod
    def _directions(group: dict[str, Any], rank: int | None, shape: tuple[int, int]) -> Any:
        side = side_of(group["proj_type"], shape)
        most = {"left": shape[0], "right": shape[1], "full": min(shape)}[side]
        count = round(most * group["density"]) if rank is None else rank
        if count == 0 or count >= most:
            return Everything() if count else Nothing()
        gemm = gemm_dtype(group)
        if group["subspace"] == "random":
            return RandomSubspace(count, side, gemm=gemm)
        kind = SVDSubspace if group["refresh"] == "svd" else IterativeSubspace
        # A matrix has no more singular vectors than its shorter side is long.
        return kind(min(count, *shape), side, gemm=gemm)

    def projects(self, param: Tensor) -> bool:
        """Whether a parameter is in a group that is divided, and can be."""
        group = self.param_groups[self.place_of(param)[0]]
        return _divided(group) and (group["is_proj_params"] or super().projects(param))

    # -- blocks ----------------------------------------------------------------------------

    def _is_active(self, param: Tensor, group: dict[str, Any], place: tuple[int, int]) -> bool:
        block = self.state[param]["block"].item() if self.state.get(param) else 0.0
        return block > 0 if block else place[1] in self._turn(group, place[0], 1)

    @staticmethod
    def _turn(group: dict[str, Any], number: int, period: int) -> frozenset[int]:
        order, count = group["block_order"], len(group["params"])
        return active_blocks(order, count, _active_count(group), period, group["seed"], number)

    def state_spec(self, param: Tensor, group: dict[str, Any]) -> Spec:
        """Shape and dtype of what is kept; of an inactive block nothing but the period."""
        spec = super().state_spec(param, group)
        return {**spec, **_BLOCK} if _in_blocks(group) else spec

    def saved_spec(self, param: Tensor, saved: Mapping[str, Any]) -> Spec:
        """A block that was active when it was saved has moments, a hook's choice its indices."""
        place = self.place_of(param)
        group = self.param_groups[place[0]]
        if not _in_blocks(group) or not (block := float(saved.get("block", 0.0))):
            spec, space = self.expected_state(param), self._slot(param).subspace
            given = "indices" in saved and isinstance(space, Coordinates)
            return {**spec, "indices": ((space.count,), torch.int64)} if given else spec
        space = Identity() if block > 0 else Nothing()
        slot = make_slot(param, group, place, self._parts_of(place[0]), space)
        return {**COUNTERS, **slot.expected(), **_BLOCK}

    def home(self, name: str, param: Tensor) -> torch.device:
        """The period is the host's."""
        return torch.device("cpu") if name == "block" else super().home(name, param)

    def due(self, entry: Entry) -> bool:
        """Whether a new part is chosen."""
        gap = entry.group["update_gap"]
        if _in_blocks(entry.group):
            period = 1 + (self._clock(entry) - 1) // gap
            return bool(abs(entry.state["block"].item()) != period)
        if isinstance(self._slot(entry.param).subspace, Everything):
            steps = int(entry.state["step"].item())
            return bool(entry.group["reset"]) and steps > 0 and steps % gap == 0
        return super().due(entry)

    def _clock(self, entry: Entry) -> int:
        """What a group of blocks will have counted with this step."""
        group, state = entry.group, self.state
        # A state that was saved without it has the tensors' own counts.
        clock: int = group.get("clock") or max(
            (int(state[p]["step"].item()) for p in group["params"] if "step" in state.get(p, {})),
            default=0,
        )
        # In the backward pass nobody says where a step ends but the tensors' own counts.
        return max(clock, int(entry.state["step"].item()) + 1) if entry.alone else clock + 1

    def count(self, entries: list[Entry]) -> None:
        """Count a step of each parameter, and of each group of blocks."""
        clocks = {e.place[0]: self._clock(e) for e in entries if _in_blocks(e.group)}
        super().count(entries)
        for number, clock in clocks.items():
            self.param_groups[number]["clock"] = clock

    def advance(self, entries: list[Entry], verdict: Verdict) -> None:
        """Give the blocks their turn, then step."""
        turns = {}
        for number in {entry.place[0] for entry in entries if _in_blocks(entry.group)}:
            group = self.param_groups[number]
            period = 1 + (group["clock"] - 1) // group["update_gap"]
            turns[number] = period, self._turn(group, number, period)
        for entry in entries:
            if entry.place[0] in turns:
                self._give_turn(entry, *turns[entry.place[0]])
            elif entry.due and entry.usable:
                slot = self._slot(entry.param)
                if isinstance(slot.subspace, Everything):
                    self.reset_moments(slot, entry.state)
        super().advance(entries, verdict)

    def _give_turn(self, entry: Entry, period: int, turn: frozenset[int]) -> None:
        state: State = entry.state
        if abs(state["block"].item()) == period:
            return
        active = entry.place[1] in turn
        if self.projection_hook is not None:
            said = self.projection_hook(entry.param, entry.grad, "block")
            active = active if said is None else bool(said)
        state["block"].fill_(period if active else -period)
        state["unseen"].copy_(state["step"] - 1.0)
        for name in [n for n in state if n not in COUNTERS and n not in _BLOCK]:
            del state[name]
        self._slots.pop(entry.param, None)
        if active:
            for name, (shape, dtype) in self._slot(entry.param).expected().items():
                state[name] = self.zeros(name, shape, dtype, entry.param)


def _tensor(each: Any) -> Any:
    return each[1] if isinstance(each, tuple) else each


def _divided(group: Mapping[str, Any]) -> bool:
    """Whether some of a group's weights have state in part only."""
    rank = group["rank"]
    ranks = rank if isinstance(rank, list | tuple) else [rank]
    return bool(group["is_proj_params"]) or any(each is not None for each in ranks)


def _in_blocks(group: Mapping[str, Any]) -> bool:
    return _divided(group) and group["subspace"] == "block"


def _active_count(group: Mapping[str, Any]) -> int:
    # Halves go to the even number, as in the official code.
    return round(len(group["params"]) * float(group["density"]))
